"""What an installation brings, and what importing it leaves alone."""

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

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
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    run(sys.executable, *build, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


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
def test_core_alone_attends(wheel, tmp_path):
    """`pip install kvpolicy` brings torch, numpy and pydantic, and these are enough."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert "attended with" in run(python, "-c", textwrap.dedent(ATTEND), cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)

    # The command is there, and says in one line what it lacks.
    done = subprocess.run(
        [python, "-m", "kvpolicy", "--help"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 2, done
    assert "kvpolicy[lab]" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_importing_changes_nothing_in_transformers(tmp_path):
    pytest.importorskip("transformers")
    assert "as they were" in run(sys.executable, "-c", textwrap.dedent(UNTOUCHED), cwd=tmp_path)
