"""What an installation brings, and what importing it leaves alone."""

import email
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import kvpolicy
from kvpolicy.ops.cpu import native

ROOT = Path(__file__).parents[2]
BUILD = (sys.executable, "-m", "build", "--no-isolation")

# Attention of two layers over 3 lines of 4 tokens, in a budget of one line and a half.
ATTEND = """
    import importlib.util, sys
    import kvpolicy, torch

    assert "site-packages" in kvpolicy.__file__, kvpolicy.__file__
    for name in ("transformers", "typer", "rich", "matplotlib", "hypothesis", "safetensors"):
        assert importlib.util.find_spec(name) is None, name
    # The other import package is there; only its own extra is missing.
    assert importlib.util.find_spec("kvpolicy_adapters") is not None

    torch.manual_seed(0)
    layout = kvpolicy.RasterLayout(rows=3, cols=4, prefix=1)
    for policy in ("streaming_llm", "h2o"):
        cache = kvpolicy.PolicyCache(policy, budget=6, layout=layout, num_layers=2)
        for _ in range(layout.length):
            for layer in range(2):
                query, key, value = torch.randn(2, 4, 1, 8), *torch.randn(2, 2, 2, 1, 8)
                out = cache.attend(layer, query, key, value)
                assert out.shape == query.shape and out.isfinite().all()
        assert cache.positions(0).shape == (2, 2, 7), cache.positions(0).shape
        assert tuple(cache.stats().peak_tokens) == (7, 7), cache.stats()
    print("attended with", ", ".join(kvpolicy.available()))
"""

UNTOUCHED = """
    import importlib
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    watched = [
        importlib.import_module(f"transformers.{name}")
        for name in ("cache_utils", "masking_utils", "modeling_utils", "generation.utils")
    ]
    # Lazily imported names of transformers would look like changes: bring in what adapters use.
    transformers.Cache, transformers.DynamicCache, transformers.PreTrainedModel

    def state():
        found = {}
        for interface in (AttentionInterface, AttentionMaskInterface):
            for name, function in interface().items():
                found[interface.__name__, name] = function
            for name, value in vars(interface).items():
                found[interface.__name__, "attribute", name] = value
            for name, function in interface._global_mapping.items():
                found[interface.__name__, "global", name] = function
        for module in watched:
            for name, value in vars(module).items():
                found[module.__name__, name] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    for attribute, inner in vars(value).items():
                        found[module.__name__, name, attribute] = inner
        return found

    before = state()
    import kvpolicy
    import kvpolicy_adapters
    after = state()
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    changed = [name for name in before if before[name] is not after[name]]
    assert not changed, changed
    print(len(before), "names are as they were")
"""


def run(*command, cwd, **environment):
    """Run a command, and fail with all that it said."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the project as it lies here, built with the build backend of this environment."""
    pytest.importorskip("hatchling", reason="the dev extra brings the build backend")
    out = tmp_path_factory.mktemp("wheel")
    said = run(
        *BUILD, "--wheel", "--outdir", out, ROOT, cwd=out, PATH="", CXX="", KVPOLICY_NATIVE="1"
    )
    assert re.search("without CPU kernels: there is no C\\+\\+ compiler .*build-kernel", said), said
    (wheel,) = out.glob("*-py3-none-any.whl")
    return wheel


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="kernels are for x86-64"
)
def test_a_wheel_carries_the_kernels(folder, tmp_path):
    """A copy of the kernels that tests have built stands for the compiler's work."""
    pytest.importorskip("hatchling", reason="the dev extra brings the build backend")
    good = folder / native.library().name
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp "{good}" "$2"\n')
    compiler.chmod(0o755)
    # As pip isolates a build: an interpreter that has nothing, and finds torch by PYTHONPATH alone.
    venv.create(tmp_path / "bare", with_pip=False)
    run(
        tmp_path / "bare" / "bin" / "python",
        *BUILD[1:],
        "--wheel",
        "--outdir",
        tmp_path,
        ROOT,
        cwd=tmp_path,
        CXX=str(compiler),
        KVPOLICY_NATIVE="1",
        PYTHONPATH=os.pathsep.join(p for p in sys.path if p.endswith("site-packages")),
    )
    (wheel,) = tmp_path.glob("*-py3-none-linux_x86_64.whl")
    inside = zipfile.ZipFile(wheel)
    built = native.SHIPPED.relative_to(Path(kvpolicy.__file__).parents[1]).as_posix()
    said = json.loads(inside.read(f"{built}/built.json"))
    assert said["torch"] == torch.__version__.partition("+")[0]
    assert "x86-64-v3" in said["sha256"]
    for name, digest in said["sha256"].items():
        library = inside.read(f"{built}/{name}.so")
        assert hashlib.sha256(library).hexdigest() == digest == native.digest(good)
    wheel_says = inside.read(next(name for name in inside.namelist() if name.endswith("/WHEEL")))
    assert b"Root-Is-Purelib: false" in wheel_says

    # A compiler that fails, or whose work can't be loaded, costs the kernels and not the wheel.
    for script, words in (
        ("echo out of memory >&2; exit 3", "out of memory"),
        ('while [ "$1" != -o ]; do shift; done; echo > "$2"', "the trial of x86-64-v[34] failed"),
    ):
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        out = tmp_path / "without"
        said = run(
            *BUILD,
            "--wheel",
            "--outdir",
            out,
            ROOT,
            cwd=tmp_path,
            CXX=str(compiler),
            KVPOLICY_NATIVE="1",
        )
        assert re.search(f"without CPU kernels: (.*\n)*.*{words}", said), said
        assert next(out.iterdir()).name.endswith("-py3-none-any.whl")


def message(wheel):
    """The metadata of a wheel."""
    inside = zipfile.ZipFile(wheel)
    (name,) = (name for name in inside.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(inside.read(name))


@pytest.mark.slow
def test_wheel_holds_the_packages_and_their_data(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(folder.parent).as_posix()
        for folder in (ROOT / "kvpolicy", *(ROOT / "adapters").glob("kvpolicy_*"))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"kvpolicy/py.typed", "kvpolicy_adapters/py.typed"} <= inside
    assert inside == expected


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    run(*BUILD, "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = packed.getnames()
        packed.extractall(tmp_path, filter="data")
    inside = {name.partition("/")[2] for name in names}
    assert {"tests/conftest.py", "docs/index.md", "examples/text.py", "Makefile"} <= inside
    assert not [name for name in inside if "__pycache__" in name or ".venv" in name]
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = ("--wheel", "--outdir", tmp_path / "again", source)
    run(*BUILD, *again, cwd=tmp_path, KVPOLICY_NATIVE="0")
    (again,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(again) as first, zipfile.ZipFile(wheel) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


@pytest.mark.slow
def test_core_alone_attends(wheel, tmp_path):
    """What `pip install kvpolicy` brings is enough: what the wheel says it needs, and no more."""
    needs = [each for each in message(wheel).get_all("Requires-Dist") if "extra ==" not in each]
    assert {Requirement(each).name for each in needs} == {"numpy", "pydantic", "torch"}
    python = bare(tmp_path / "venv", *needs)
    add(python, wheel)
    assert "attended with" in run(python, "-c", textwrap.dedent(ATTEND), cwd=tmp_path)
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=tmp_path)

    # The command is there, and says in one line what it lacks.
    done = subprocess.run(
        [python, "-m", "kvpolicy", "--help"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 2, done
    assert "kvpolicy[lab]" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def bare(folder, *packages):
    """A virtual environment with nothing in it, but for links to these packages' needs."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages") or folder.glob("Lib/site-packages")
    wanted, met = list(packages), set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in met or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        met.add(name)
        there = distribution(name)
        wanted += there.requires or []
        for top in {file.parts[0] for file in there.files if file.parts[0] not in ("..", "/")}:
            link = site / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(there.locate_file(top)).resolve())
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def add(python, *what):
    """Really install packages, without what they need."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps")
    run(*pip, "--no-build-isolation", "--no-index", *what, cwd=ROOT)


@pytest.mark.slow
def test_core_tests_pass_where_nothing_else_is_installed(wheel, tmp_path):
    """As `pip install kvpolicy pytest hypothesis` has it: no transformers, no command line."""
    python = bare(tmp_path / "venv", "torch", "numpy", "pydantic", "pytest", "hypothesis")
    add(python, wheel)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    for folder in ("support", "core", "policies"):
        shutil.copytree(ROOT / "tests" / folder, tests / folder)
    core = ("core/test_registry.py", "core/test_span.py", "policies/test_policy.py")
    said = run(python, "-m", "pytest", "-q", *(tests / each for each in core), cwd=tmp_path)
    assert " passed" in said
    said = run(python, "-c", CHECKED, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "holds" in said


CHECKED = """
import importlib.util
import kvpolicy, kvpolicy.testing
assert importlib.util.find_spec("transformers") is None
assert "site-packages" in kvpolicy.__file__, kvpolicy.__file__
kvpolicy.testing.check_policy(kvpolicy.create("linear", anchors=2), examples=5)
print("holds")
"""


@pytest.mark.slow
def test_a_package_of_ones_own_joins_by_being_installed(wheel, tmp_path):
    """examples/my_policy: listed without being loaded, checked, and compared."""
    for package_name in ("typer", "pyarrow", "transformers"):
        pytest.importorskip(package_name, reason="ablate needs the extra 'lab'")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # torch and the rest come from where they are; kvpolicy and the package are really installed.
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (site / "theirs.pth").write_text("\n".join(theirs) + "\n")
    package = tmp_path / "my_policy"
    shutil.copytree(ROOT / "examples" / "my_policy", package)
    add(python, wheel, package)

    def call(*command):
        return run(python, "-P", "-m", *command, cwd=tmp_path, OMP_NUM_THREADS="1", COLUMNS="120")

    asked = "import kvpolicy, sys; kvpolicy.available(); print(kvpolicy.__file__, *sys.modules)"
    said = run(python, "-P", "-c", asked, cwd=tmp_path)
    assert str(site) in said
    assert "my_policy" not in said.split()
    assert "of the package my-policy (not loaded)" in call("kvpolicy", "list")
    said = call("kvpolicy", "check", "mass_rate", "--examples", "5", "--set", "window=2")
    assert "MassRate(window=2)" in said
    assert "invariants hold" in said
    own = call("pytest", "-q", package / "test_my_policy.py", "-p", "no:cacheprovider")
    assert "1 passed" in own
    plugin = call(
        "pytest", "-q", "--kvpolicy", "mass_rate", "--kvpolicy-examples", "2", "-k", "pins"
    )
    assert "1 passed" in plugin
    sizes = ("--metrics", "bits_per_pixel", "--option", "scored=2", "--executor", "inline")
    plan = ("--subject", "fashion-ar", "--policies", "mass_rate", "--budgets", "1/6")
    call("kvpolicy", "ablate", *plan, *sizes, "--out", "run")
    assert "mass_rate" in (tmp_path / "run" / "summary.csv").read_text()


@pytest.mark.slow
def test_the_metadata_is_complete(wheel):
    inside = zipfile.ZipFile(wheel)
    names = inside.namelist()
    text = message(wheel).as_string()
    for field in (
        "Name: kvpolicy",
        "Summary: ",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.11",
        "Classifier: Typing :: Typed",
        "Provides-Extra: lab",
        "Description-Content-Type: text/markdown",
    ):
        assert f"\n{field}" in text, field
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Of the data and of the weights that ship.
    assert "kvpolicy_adapters/zoo/fashion_ar/LICENSE.fashion-mnist" in names
    for model in ("clipart_ar", "fashion_ar"):
        card = json.loads(inside.read(f"kvpolicy_adapters/zoo/{model}/card.json"))
        assert card["data_licence"]
        assert card["weights_licence"]
        for file, digest in card["files"].items():
            data = inside.read(f"kvpolicy_adapters/zoo/{model}/{file}")
            assert hashlib.sha256(data).hexdigest() == digest


@pytest.mark.slow
def test_importing_changes_nothing_in_transformers(tmp_path):
    pytest.importorskip("transformers")
    assert "as they were" in run(sys.executable, "-c", textwrap.dedent(UNTOUCHED), cwd=tmp_path)
