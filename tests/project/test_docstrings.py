"""Docstrings: their examples run, and each says something."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import llamagen_standin

import kvpolicy

pytest.importorskip("transformers", reason="half of the modules need transformers")
pytest.importorskip("typer", reason="the lab needs its extra")

from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy_adapters
from kvpolicy.decoding.decoder import DECODERS
from kvpolicy.parts.named import PARTS
from kvpolicy.registry import POLICIES
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig
from kvpolicy_adapters.images.lpd import LPD, LPDConfig

ROOT = Path(__file__).parents[2]
#: Workers of the bench belong to environments with other packages; the package's own entry runs it.
LEFT_OUT = re.compile(r"\.(bench\.peers|bench\.workers)\.|__main__$|ray_executor$")
#: Whether lm-evaluation-harness is here: it is in CI, and is not without its extra.
HARNESS = importlib.util.find_spec("lm_eval") is not None
#: A literal block: what stands deeper than the line that ends in "::".
BLOCK = re.compile(r"^( *)(?:.*\S)?::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


def modules() -> Iterator[ModuleType]:
    for package in (ROOT / "kvpolicy", ROOT / "adapters" / "kvpolicy_adapters"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            if not LEFT_OUT.search(name) and (HARNESS or ".lm_eval" not in name):
                yield importlib.import_module(name)


MODULES = {module.__name__: module for module in modules()}
#: Objects with a docstring, by their full name.
DOCUMENTED = {
    test.name: test
    for module in MODULES.values()
    for test in doctest.DocTestFinder(exclude_empty=False).find(module)
}


@pytest.fixture(autouse=True)
def forget_what_examples_register(monkeypatch):
    """Other tests list what there is."""
    for registry in (POLICIES, DECODERS, *PARTS.values()):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.mark.parametrize("name", [name for name, test in DOCUMENTED.items() if test.examples])
def test_examples_say_what_they_show(name):
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(DOCUMENTED[name], out=said.append)
    assert not said, "".join(said)


def blocks(docstring: str) -> list[str]:
    """The literal blocks of a docstring that are Python."""
    found = [textwrap.dedent(block).strip() for _, block in BLOCK.findall(docstring + "\n")]
    return [block for block in found if re.search(r"^(with|\w+ = )", block, re.MULTILINE)]


def names() -> dict[str, Any]:
    """What the blocks take for granted: a tiny model, its official twin, tensors, checkpoints."""
    torch.manual_seed(0)
    config = LlamaGenConfig(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
        **{"vocab_size": 40, "grid_size": 24, "num_classes": 1000},
    )
    model = LlamaGen(config).eval()
    return {
        "kvpolicy": kvpolicy,
        "torch": torch,
        "attach": kvpolicy_adapters.attach,
        "skinny_gemm": kvpolicy_adapters.skinny_gemm,
        # What a compiler makes of a step is tested elsewhere, and takes long.
        "compile_decode": partial(kvpolicy_adapters.compile_decode, backend="eager"),
        "read_official": lambda path, grid_size=None: tiny_lpd() if "lpd" in path else model,
        "Parallel": kvpolicy.Parallel,
        "model": model,
        "layout": kvpolicy.RasterLayout(rows=24, cols=24, prefix=1),
        "inputs": {"condition": torch.tensor([3])},
        "layer": 0,
        **dict(zip(("query", "key", "value"), torch.randn(3, 1, 2, 1, 8), strict=True)),
        "gpt_model": llamagen_standin.Transformer("c2i", side=24).eval(),
        "generate": llamagen_standin.generate,
        "c_indices": torch.tensor([3]),
        "latent_size": 24,
        "decode": kvpolicy_adapters.decode,
        "prompt": torch.tensor([[3]]),
    }


def tiny_lpd() -> LPD:
    """What a block reads where its file is one of LPD's."""
    config = LPDConfig(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
    )
    return LPD(config).eval()


def language_model() -> LlamaForCausalLM:
    """What a block means by ``model`` where it has a prompt of tokens."""
    config = LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 600},
    )
    return LlamaForCausalLM(config).eval()


BLOCKS = {
    f"{name}-{number}": block
    for name, test in DOCUMENTED.items()
    for number, block in enumerate(blocks(test.docstring))
    # "..." stands for what only a reader can fill in.
    if "..." not in block and "cuda" not in block
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_run(name, tmp_path, monkeypatch, request):
    if "skinny_gemm" in BLOCKS[name]:
        request.getfixturevalue("kernel")
    monkeypatch.chdir(tmp_path)
    given = names()
    if "prompt" in BLOCKS[name]:
        given["model"] = language_model()
    exec(BLOCKS[name], given)


def test_there_are_examples_to_run():
    assert len(BLOCKS) >= 7
    assert sum(bool(test.examples) for test in DOCUMENTED.values()) >= 11


def test_an_example_that_lies_is_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda _: None).failed == 1
    assert blocks("Example::\n\n    x = 1 / 0\n\nAnd so on.") == ["x = 1 / 0"]


def silent(source: str) -> list[str]:
    """Docstrings of so few words that they say nothing that the name did not."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    told = [
        ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
    ]
    return [text for text in told if text is not None and len(re.findall(r"\w+", text)) < 3]


def test_docstrings_say_something():
    found = {}
    for folder in ("kvpolicy", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if few := silent(path.read_text(encoding="utf-8")):
                found[str(path.relative_to(ROOT))] = few
    assert not found


def test_a_docstring_that_says_nothing_is_seen():
    assert silent('class A:\n    """As it is."""\n\n    def b(self):\n        """One."""\n') == [
        "One."
    ]
