"""Prompts as they lie in files: text, JSON lines, GenEval's metadata, DPG's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.items import Item

__all__ = ["prompt_items"]

#: Fields that a line of GenEval's ``evaluation_metadata.jsonl`` has.
_GENEVAL = {"tag", "include", "prompt"}
_GENEVAL_PATH = "geneval/{row:05d}/samples/{sample:05d}.png"
_PATH = "images/{row:05d}_{sample}.png"


def prompt_items(source: Path, per_prompt: int) -> list[Item]:
    """The images that a file or a folder of prompts asks for, prompt by prompt.

    ====================================  =========================================================
    a ``.txt`` file                       a prompt a line; ``images/00000_0.png``
    a ``.jsonl`` file                     objects with ``prompt``, and whatever else
    GenEval's ``evaluation_metadata``     ``geneval/00000/samples/00000.png`` (arXiv:2310.11513)
    a folder of ``.txt`` files            DPG's: a prompt a file; ``images/NAME_0.png``
                                          (arXiv:2403.05135), and of one or four ``dpg/NAME.png``
    ====================================  =========================================================

    Args:
        source: the file or folder.
        per_prompt: images of each prompt.

    Raises:
        ParameterError: it is not UTF-8, holds no prompt, or a line can't be read; the message says
            which.
        OSError: it can't be read.
    """
    if source.is_dir():
        return _folder(source, per_prompt)
    if source.suffix == ".txt":
        lines = [line.strip() for line in _lines(source)]
        prompts: list[dict[str, Any]] = [{"prompt": line} for line in lines if line]
    elif source.suffix == ".jsonl":
        prompts = _json_lines(source)
    else:
        raise ParameterError(
            f"prompts {source}: expected a .txt file (a prompt a line), a .jsonl file (objects "
            f"with 'prompt'), or a folder of .txt files"
        )
    if not prompts:
        raise ParameterError(f"prompts {source} holds no prompt")
    geneval = all(prompt.keys() >= _GENEVAL for prompt in prompts)
    pattern = _GENEVAL_PATH if geneval else _PATH
    return [
        Item(
            path=pattern.format(row=row, sample=sample),
            row=row,
            sample=sample,
            prompt=about["prompt"],
            about={name: value for name, value in about.items() if name != "prompt"},
        )
        for row, about in enumerate(prompts)
        for sample in range(per_prompt)
    ]


def _folder(source: Path, per_prompt: int) -> list[Item]:
    files = sorted(source.glob("*.txt"))
    if not files:
        raise ParameterError(f"prompts {source}: the folder has no .txt file, of a prompt each")
    found = []
    for row, file in enumerate(files):
        prompt = " ".join(_text(file).split())
        if not prompt:
            raise ParameterError(f"prompts {file} is empty")
        found += [
            Item(f"images/{file.stem}_{sample}.png", row, sample, prompt, {"dpg": file.stem})
            for sample in range(per_prompt)
        ]
    return found


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ParameterError(
            f"prompts {file}: line {line} is not UTF-8 (byte {data[error.start]:#04x}); save the "
            f"file as UTF-8"
        ) from None


def _lines(file: Path) -> list[str]:
    """As an editor numbers them: ``str.splitlines`` would also cut at characters within a line."""
    return re.split(r"\r\n|\n|\r", _text(file))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            about = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ParameterError(f"prompts {file}: line {number} is not JSON: {error}") from None
        if not isinstance(about, dict) or not isinstance(about.get("prompt"), str):
            raise ParameterError(
                f"prompts {file}: line {number} has no 'prompt' that is text: {line.strip()[:60]}"
            )
        if not about["prompt"].strip():
            raise ParameterError(f"prompts {file}: line {number}: 'prompt' is empty")
        found.append(about)
    return found
