"""Drawing: items and their random numbers, files of prompts, and a folder that loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="drawing needs the extra 'lab'")

import kvpolicy
from kvpolicy.errors import (
    BudgetError,
    ModelError,
    ParameterError,
    RunFolderError,
    UnknownNameError,
)
from kvpolicy.lab.draw.batch_size import BatchSize
from kvpolicy.lab.draw.draw import Asked, DrawTask, Pictures, draw
from kvpolicy.lab.draw.image_model import (
    IMAGE_MODELS,
    Drawn,
    ModelSource,
    Sampler,
    load_image_model,
)
from kvpolicy.lab.draw.items import Item, class_items, classes_of
from kvpolicy.lab.draw.outputs import read_image, write_grids, write_npz
from kvpolicy.lab.draw.prompts import prompt_items

HERE = Path(__file__).parent
LAYOUT = kvpolicy.RasterLayout(rows=4, cols=4, prefix=1)


class Toy:
    """Draws 4 x 4 pixels out of an item's random numbers, and has room for so many at a time."""

    name = "toy"
    num_layers = 1
    layout = LAYOUT
    room = 5
    says: BaseException = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    drawn: list[int] = []  # noqa: RUF012 - what all of them drew

    def check(self, item, sampler):
        if item.row > 9:
            raise ParameterError(f"classes: {item.row} is not one of toy's 0 to 9")

    def draw(self, items, setting, sampler, seed):
        if len(items) > self.room:
            raise self.says
        self.drawn.append(len(items))
        numbers = np.stack([item.chances(seed, 16) for item in items]).reshape(-1, 4, 4)
        stats = kvpolicy.PolicyCache("full", None, layout=LAYOUT, num_layers=1).stats()
        return Drawn((numbers * 256).astype(np.uint8), (stats,))


def make_toy(source):
    return Toy()


if "toy" not in IMAGE_MODELS.names():
    IMAGE_MODELS.add("toy", make_toy)


class Nobody:
    def begun(self, finished, total): ...
    def drew(self, count, batch): ...


def asked(seed=0, budget="1/2"):
    return Asked(ModelSource("toy"), "streaming_llm", {}, budget, Sampler(), seed)


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").glob("*"))}


def listed(folder):
    lines = (folder / "index.jsonl").read_text().splitlines()
    return [json.loads(line)["path"] for line in lines]


# --- Items -------------------------------------------------------------------------------------


def test_an_item_has_numbers_of_its_own():
    item, other = Item("a.png", 3, 0), Item("b.png", 3, 1)
    numbers = item.chances(7, 100)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert (item.chances(7, 10) == numbers[:10]).all()
    assert (Item("elsewhere.png", 3, 0).chances(7, 100) == numbers).all()
    for another in (other.chances(7, 100), item.chances(8, 100), Item("a", 4, 0).chances(7, 100)):
        assert abs(np.corrcoef(numbers, another)[0, 1]) < 0.3


def test_classes_come_in_turn():
    items = class_items(classes_of("0-2,7"), 2)
    assert [item.row for item in items] == [0, 1, 2, 7] * 2
    assert [item.path for item in items][::4] == ["images/000000.png", "images/000004.png"]
    assert {item.sample for item in items[:4]} == {0}


@pytest.mark.parametrize(
    ("text", "said"),
    [("0-", "no class"), ("a", "no class"), ("3-1", "backwards"), ("1,0-2", "1 comes twice")],
)
def test_wrong_classes_are_refused(text, said):
    with pytest.raises(ParameterError, match=said):
        classes_of(text)


# --- Prompts -----------------------------------------------------------------------------------


def test_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("﻿a red fox\n\n  un café \n", encoding="utf-8")
    items = prompt_items(tmp_path / "a.txt", 2)
    assert [item.prompt for item in items] == ["a red fox"] * 2 + ["un café"] * 2
    assert [item.path for item in items[1:3]] == ["images/00000_1.png", "images/00001_0.png"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a fox", "from": "me"}\n')
    (item,) = prompt_items(tmp_path / "b.jsonl", 1)
    assert (item.prompt, item.about, item.path) == ("a fox", {"from": "me"}, "images/00000_0.png")


def test_geneval_and_dpg_are_laid_out_as_their_evaluators_want_them(tmp_path):
    metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    lines = [json.dumps({**metadata, "prompt": name}) for name in ("a photo of a bench", "a cow")]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    items = prompt_items(tmp_path / "evaluation_metadata.jsonl", 2)
    assert items[3].path == "geneval/00001/samples/00001.png"
    draw(asked(), items, tmp_path / "g", Nobody())
    folder = tmp_path / "g" / "geneval" / "00001"
    assert json.loads((folder / "metadata.jsonl").read_text()) == {**metadata, "prompt": "a cow"}
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "00000.png",
        "00001.png",
    ]

    (tmp_path / "dpg").mkdir()
    for name in ("COCOval2014_1", "diffusiondb2"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"a picture\nof {name}\n")
    items = prompt_items(tmp_path / "dpg", 4)
    assert items[0].prompt == "a picture of COCOval2014_1"
    draw(asked(), items, tmp_path / "d", Nobody())
    assert [path.name for path in write_grids(tmp_path / "d", items)] == [
        "COCOval2014_1.png",
        "diffusiondb2.png",
    ]
    grid = read_image(tmp_path / "d" / "dpg" / "diffusiondb2.png")
    parts = [read_image(tmp_path / "d" / item.path) for item in items[4:]]
    assert (grid == np.block([parts[:2], parts[2:]])).all()
    # One image of a prompt is what the evaluator expects unless told otherwise.
    write_grids(tmp_path / "d", items[::4])
    assert (read_image(tmp_path / "d" / "dpg" / "diffusiondb2.png") == parts[0]).all()
    write_grids(tmp_path / "d", items[4:7])
    grid = read_image(tmp_path / "d" / "dpg" / "diffusiondb2.png")
    assert (grid == np.block([parts[:2], [parts[2], np.zeros_like(parts[2])]])).all()


def test_lines_end_where_editors_say(tmp_path):
    """Not within a prompt: str.splitlines cuts at these, which JSON need not escape."""
    within = "a fox\u2028in\x85the\x0bsnow"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": within}, ensure_ascii=False), "utf-8")
    (tmp_path / "a.txt").write_bytes(f"{within}\r\na cow\r".encode())
    assert [item.prompt for item in prompt_items(tmp_path / "a.jsonl", 1)] == [within]
    assert [item.prompt for item in prompt_items(tmp_path / "a.txt", 1)] == [within, "a cow"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a fox\nun caf\xe9\n", r"p\.txt: line 2 is not UTF-8 \(byte 0xe9\)"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.csv", b"a fox", r"\.jsonl file"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1 has no 'prompt'"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1: 'prompt' is empty"),
    ],
)
def test_files_of_prompts_that_cannot_be_read(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=said):
        prompt_items(tmp_path / name, 1)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(ParameterError, match=r"no \.txt file"):
        prompt_items(tmp_path, 1)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ParameterError, match=r"a\.txt is empty"):
        prompt_items(tmp_path, 1)


# --- Batches -----------------------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_batch(tmp_path):
    items = class_items(range(5), 3)
    draw(asked(), items, tmp_path / "one", Nobody(), batch=1)
    draw(asked(), items, tmp_path / "found", Nobody())
    draw(asked(), items[3:], tmp_path / "some", Nobody(), batch=3)
    ones = pictures(tmp_path / "one")
    assert len(ones) == 15
    assert ones == pictures(tmp_path / "found")
    assert pictures(tmp_path / "some").items() <= ones.items()
    draw(asked(seed=1), items, tmp_path / "other", Nobody())
    assert not set(pictures(tmp_path / "other").values()) & set(ones.values())


def test_where_memory_runs_out_batches_are_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "drawn", [])
    draw(asked(), class_items(range(10), 2), tmp_path / "run", Nobody(), batch=16)
    assert Toy.drawn == [4] * 5
    monkeypatch.setattr(Toy, "room", 0)
    monkeypatch.setattr(Toy, "says", MemoryError())  # which has no words of its own
    with pytest.raises(ModelError, match=r"no room on cpu \(MemoryError\)"):
        draw(asked(), class_items([0], 1), tmp_path / "mute", Nobody())
    monkeypatch.undo()
    monkeypatch.setattr(Toy, "room", 0)
    with pytest.raises(ModelError, match="one image at a time has no room"):
        draw(asked(), class_items(range(10), 2), tmp_path / "none", Nobody())
    monkeypatch.setattr(Toy, "room", 3)
    task = DrawTask("t", asked(), tuple(class_items(range(10), 1)))
    done = task.perform()  # as a worker does it
    assert isinstance(done, Pictures)
    assert [picture.path for picture in done.pictures] == [item.path for item in task.items]


def test_a_batch_grows_while_that_is_faster():
    sizes = BatchSize()
    for seconds, then in ((1.0, 8), (1.1, 16), (2.0, 32), (3.95, 16), (1.0, 16)):
        sizes.went_well(sizes.size, seconds, 1, on_cpu=True)
        assert sizes.size == then
    sizes = BatchSize()
    sizes.went_well(4, 1.0, 1 << 60, on_cpu=True)  # twice as many caches would fill the memory
    assert sizes.size == 4
    sizes = BatchSize(64)
    sizes.went_well(64, 1.0, 1, on_cpu=False)
    assert sizes.size == 64  # as asked for
    assert sizes.ran_out(64)
    assert sizes.size == 32
    assert not sizes.ran_out(1)


def test_a_decoder_that_shares_random_numbers_draws_whole_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "drawn", [])
    shared = Asked(ModelSource("toy"), "full", {}, None, Sampler(decoder="sjd:window=4"))
    items = class_items(range(10), 1)
    draw(shared, items, tmp_path, Nobody(), batch=4)
    assert Toy.drawn == [4, 4, 2]
    (tmp_path / items[5].path).unlink()
    before = pictures(tmp_path)
    draw(shared, items, tmp_path, Nobody(), batch=4)
    assert Toy.drawn == [4, 4, 2, 4]  # with those that had been beside it
    assert pictures(tmp_path).items() > before.items()
    with pytest.raises(ParameterError, match=r'(?s)another plan.*"batch": 4.*"batch": 5'):
        draw(shared, items, tmp_path, Nobody(), batch=5)
    with pytest.raises(ParameterError, match="window=64 is longer than the 17 tokens"):
        long = Asked(ModelSource("toy"), "full", {}, None, Sampler(decoder="sjd:window=64"))
        draw(long, items, tmp_path, Nobody())
    monkeypatch.setattr(Toy, "room", 3)
    with pytest.raises(ModelError, match="draws a batch as one"):
        draw(shared, items, tmp_path / "other", Nobody(), batch=4)


# --- The folder --------------------------------------------------------------------------------


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(tmp_path, monkeypatch):
    items = class_items(range(10), 1)
    folder, _ = draw(asked(), items, tmp_path, Nobody())
    before = pictures(tmp_path)
    line = next(folder.lines())
    assert (line["class"], line["policy"], line["budget"]) == (0, "streaming_llm", "1/2")
    assert {"seed", "seconds", "peak_tokens", "decoder", "versions", "sha256"} <= line.keys()
    monkeypatch.setattr(Toy, "drawn", [])
    draw(asked(), items, tmp_path, Nobody())
    assert Toy.drawn == []
    (tmp_path / items[3].path).write_bytes(b"half a pic")
    (tmp_path / items[4].path).unlink()
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text()[:-20])  # as a crash cuts it off
    draw(asked(), items, tmp_path, Nobody())
    assert sum(Toy.drawn) == 3
    assert pictures(tmp_path) == before
    assert sorted(listed(tmp_path)) == [item.path for item in items]


def test_another_plan_and_the_folder_of_something_else_are_refused(tmp_path):
    items = class_items(range(3), 1)
    draw(asked(), items, tmp_path / "run", Nobody())
    with pytest.raises(ParameterError, match=r'(?s)another plan.*-  "seed": 0.*\+  "seed": 1'):
        draw(asked(seed=1), items, tmp_path / "run", Nobody())
    with pytest.raises(ParameterError, match="another plan"):
        draw(asked(), items[:2], tmp_path / "run", Nobody())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ParameterError, match="not empty"):
        draw(asked(), items, tmp_path / "mine", Nobody())


def test_what_cannot_be_drawn_is_refused_before_anything_is(tmp_path):
    cases = [
        (asked(), class_items([3, 12], 1), ParameterError, "12 is not one of"),
        (asked(), [], ParameterError, "nothing to draw"),
        (asked(budget="1"), class_items([3], 1), BudgetError, "budget"),
        (
            Asked(ModelSource("toy"), "linear", {}, "1/2", Sampler(decoder="backwards")),
            class_items([3], 1),
            UnknownNameError,
            "no decoder is called 'backwards'",
        ),
    ]
    for what, items, kind, said in cases:
        with pytest.raises(kind, match=said):
            draw(what, items, tmp_path / "run", Nobody())
        assert not (tmp_path / "run").exists()
    for field in ({"cfg": 0.5}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ParameterError, match=next(iter(field))):
            Sampler(**field)
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="no GPU here"):
            load_image_model(ModelSource("toy", device="cuda"))


def draw_and_end(folder):
    """In a process of its own, which the test kills."""
    sys.path.insert(0, str(HERE))
    draw(asked(), class_items(range(10), 12), folder, Nobody(), batch=5)


@pytest.mark.slow
def test_kills_lose_no_picture_and_none_is_there_twice(tmp_path):
    folder, calm = tmp_path / "run", tmp_path / "calm"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["kvpolicy.lab.draw.draw", "test_draw"])
    chance = random.Random(0)
    safe: set[str] = set()
    kills = 0
    index = folder / "index.jsonl"
    while kills < 8 or len(safe) < 120:
        process = server.Process(target=draw_and_end, args=(folder,))
        process.start()
        if kills < 8:
            before = index.stat().st_size if index.exists() else 0
            until = time.monotonic() + 20
            while process.is_alive() and time.monotonic() < until:
                if index.exists() and index.stat().st_size != before:
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.01))
            process.kill()
            kills += 1
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        now = [
            path
            for path in map(_path_of, index.read_bytes().splitlines(keepends=True))
            if path is not None
        ]
        assert len(now) == len(set(now))
        assert safe <= set(now)
        safe = set(now)
    assert listed(folder) == [item.path for item in class_items(range(10), 12)]
    draw_and_end(calm)
    assert pictures(folder) == pictures(calm)
    assert not list(folder.rglob("*.new"))


def _path_of(line):
    return json.loads(line)["path"] if line.endswith(b"\n") else None


def test_a_full_disk_loses_nothing(tmp_path):
    """Files may not grow beyond a limit: the system refuses the write, as on a full disk."""
    items = class_items(range(10), 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
        with pytest.raises(RunFolderError, match="run the same command again"):
            draw(asked(), items, tmp_path / "run", Nobody())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    some = listed(tmp_path / "run")  # every line whole
    assert 0 < len(some) < 20
    draw(asked(), items, tmp_path / "run", Nobody())
    assert listed(tmp_path / "run")[: len(some)] == some
    assert sorted(listed(tmp_path / "run")) == [item.path for item in items]


# --- Outputs -----------------------------------------------------------------------------------


def test_the_array_is_the_pictures(tmp_path):
    items = class_items([3, 1, 7], 2)
    draw(asked(), items, tmp_path, Nobody())
    with np.load(write_npz(tmp_path, items)) as samples:
        assert samples["arr_0"].shape == (6, 4, 4, 3)
        assert samples["arr_0"].dtype == np.uint8
        assert (samples["arr_0"][4, ..., 1] == read_image(tmp_path / items[4].path)).all()
        assert samples["arr_1"].tolist() == [3, 1, 7, 3, 1, 7]
