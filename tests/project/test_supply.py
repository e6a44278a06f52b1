"""What comes in: no pickle, no code out of data, no network, no stranger's code unasked."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import OFFLINE

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("kvpolicy", "adapters", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
#: Modules that run, or may run, what a file says.
CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
#: Modules that reach for the network by themselves.
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "huggingface_hub", "socket"}

_CAUGHT = {"pickle.UnpicklingError"}


def complaints(source: str) -> list[str]:
    """What a source does that none of ours may."""
    found = []
    tree = ast.parse(source)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # What torch.load raises on a pickle that it refuses has to be named to be caught.
    harmless = {"pickle"} if {u for u in used if u.startswith("pickle.")} == _CAUGHT else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [
                f"line {node.lineno}: imports {name}"
                for name in names
                if name.partition(".")[0] in (CODE_IN_DATA | NETWORK) - harmless
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
                found.append(f"line {node.lineno}: calls {name}")
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                found.append(f"line {node.lineno}: {name} with pickles")
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(f"line {node.lineno}: {name}, not yaml.safe_load")
            if given.get("trust_remote_code", "False") != "False" or given.get("shell") == "True":
                found.append(f"line {node.lineno}: {name} runs what it is given")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_out_of_data_and_no_network(path):
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import urllib.request",
        "def f():\n    import requests",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_guard_bites(source):
    assert complaints(source)


def test_the_guard_lets_pass():
    fine = "import json\ntorch.load(p, weights_only=True)\nnp.load(p)\nmodel.eval()\nre.compile(p)"
    assert complaints(fine) == []


ATTACH = (
    OFFLINE
    + """
import torch, kvpolicy_adapters
from kvpolicy_adapters import zoo
box = zoo.load("fashion-ar")
with kvpolicy_adapters.attach(box.model, policy="linear", budget="1/6", layout=box.layout) as cache:
    out = box.model.generate(torch.tensor([[16]]), cache=cache, max_new_tokens=160,
                             do_sample=False)
assert out.shape == (1, 161), out.shape
assert min(cache.stats().evictions) > 0
print("generated offline")
"""
)


def offline(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_connection_would_be_seen(tmp_path):
    done = offline(OFFLINE + "\nsocket.create_connection(('127.0.0.1', 9))", tmp_path)
    assert done.returncode == 1
    assert "NETWORK" in done.stderr


# That the demo needs none either is seen where it runs: tests/lab/test_demo.py.
@pytest.mark.slow
def test_attach_needs_no_network(tmp_path):
    pytest.importorskip("transformers", reason="the adapters need transformers")
    done = offline(ATTACH, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generated offline" in done.stdout
    assert "NETWORK" not in done.stderr
