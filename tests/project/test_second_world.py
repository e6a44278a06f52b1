"""The example of a second world: halves that share, and figures that say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from support.processes import run_script
from support.tiny_clipart import write_clipart

from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy_adapters import attach
from kvpolicy_adapters.zoo.clipart import open_clipart

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, EXAMPLES)
    yield
    sys.path.remove(EXAMPLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clipart")
    write_clipart(path)
    return path


@pytest.mark.parametrize("name", ["LinearOfConditional", "LinearOfBoth", "Linear2DOfConditional"])
def test_halves_that_share_hold_the_same_and_alike_ones_what_they_held_alone(folder, name):
    from second_world import halves

    box = open_clipart(str(folder))
    layout, tokens = box.layout(), box.test_tokens(2)[:, :-1]
    nothing = torch.cat([box.unconditional().expand(2, -1), tokens[:, 9:]], dim=1)
    own = {"Linear2DOfConditional": "linear2d"}.get(name, "linear")

    def held(policy, fed):
        how = {"policy": policy, "budget": "1/6", "layout": layout}
        with torch.inference_mode(), attach(box.model, **how) as cache:
            logits = box.model(fed, **cache.as_argument).logits
            return cache.positions(0), logits

    fed = torch.cat([tokens, nothing])
    apart, together = held(own, fed)[0], held(getattr(halves, name)(), fed)[0]
    assert not torch.equal(apart[:2], apart[2:])
    assert torch.equal(together[:2], together[2:])
    assert torch.equal(together[:2], apart[:2]) == (name != "LinearOfBoth")
    twice = torch.cat([tokens, tokens])
    for one, other in zip(held(own, twice), held(getattr(halves, name)(), twice), strict=True):
        assert torch.equal(one, other)


def test_a_part_is_measured_once_and_its_figures_are_those_of_its_cells(folder, tmp_path, capsys):
    from second_world.__main__ import main

    def run():
        main(tmp_path, drawings=3, pictures=1, only="halves", option=[f"folder={folder}"])
        return json.loads((tmp_path / "worlds.json").read_text())["halves"]

    found = run()
    assert "halves: 0 cells are finished, 6 to be measured" in capsys.readouterr().out
    assert run() == found
    assert "halves: 6 cells are finished, 0 to be measured" in capsys.readouterr().out
    assert found["items"] == 3
    rows = {row["policy"]: row for row in found["rows"]}
    cells = {cell.cell.policy: cell.scores() for cell in open_run(tmp_path / "halves").finished()}
    full, one, other = (
        cells[name]["guided_bits"]
        for name in ("full", "linear", "second_world.halves:LinearOfBoth")
    )
    assert rows["linear"]["extra"] == pytest.approx(paired_bootstrap(one - full), abs=1e-6)
    less = rows["LinearOfBoth"]["less"]["linear"]
    assert less == pytest.approx(paired_bootstrap(one - other), abs=1e-6)
    assert len(rows["linear"]["less"]) == 4
    table = (tmp_path / "worlds.md").read_text()
    over = [-less[0], -less[2], -less[1]]
    assert f"| {over[0]:+.4f} ({over[1]:+.4f} to {over[2]:+.4f}) |" in table


def test_what_carried_over_is_what_intervals_say():
    from second_world.figures import page

    def world(*differences):
        rows = [
            {
                "policy": "linear",
                "budget": "1/6",
                "extra": [0.1, 0.1, 0.1],
                "less": dict(zip(("rkv", "h2o", "streaming_llm"), differences, strict=True)),
            },
            {"policy": "linear2d", "budget": "1/6", "less": {"linear": [0.04, 0.03, 0.05]}},
        ]
        return {"about": "", "metric": "bits_per_code", "items": 9, "rows": rows}

    spans = ([0.2, 0.1, 0.3], [-0.2, -0.3, -0.1], [0.1, -0.1, 0.3])
    drawn = [
        {"policy": policy, "budget": budget, "value": [passes], "seconds": 1.0}
        for policy, budget, passes in (
            ("full", None, 576.0),
            ("linear@sjd", "1/6", 192.0),
            ("linear@sjd:window=64", "1/6", 144.0),
        )
    ]
    passes = {"about": "Passes", "metric": "passes", "items": 1, "rows": drawn}
    text = page({"clipart": world(*spans), "fashion": world(*reversed(spans)), "passes": passes})
    assert "speculating | 4.0 (`sjd:window=64`) |  |" in text
    assert "| `linear@sjd` | 192 | 3.0 | 1.0 |" in text
    assert "carried" not in page({"passes": passes})
    assert "| | clipart-ar | fashion-ar |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `linear` before `rkv`")]
    assert [cell.strip().split(":")[0] for cell in row.split("|")[2:4]] == ["yes", "not clear"]
    assert "| `linear` before `h2o` | no: -0.2000 (-0.3000 to -0.1000) |" in text
    assert "than `linear`, 1/6 | 40% (30% to 50%) | 40% (30% to 50%) |" in text


def test_every_part_is_a_plan_of_its_own():
    from second_world.parts import HALVES, WORLDS, parts

    every = parts(100, 4, {"folder": "here"})
    names = [part.name for part in every]
    assert len(set(names)) == len(names)
    assert set(WORLDS) <= set(names)
    for part in every:
        assert part.plan.metrics == (part.metric,)
        assert (part.plan.options.get("folder") == "here") == (part.plan.subject == "clipart-ar")
    calibration = [part for part in every if part.plan.options.get("split") == "calibration"]
    assert [part.name for part in calibration] == ["knobs-clipart", "knobs-fashion"]
    assert np.prod([len(HALVES), 1]) + 1 == len(every[names.index("halves")].plan.cells())


@pytest.mark.slow
@pytest.mark.parametrize("policies", ["full", "full,linear"])
def test_a_sheet_has_every_prompt_and_refuses_what_the_model_does_not_know(
    folder, tmp_path, policies
):
    script = Path(EXAMPLES) / "clipart_sheet.py"
    asked = ("--folder", folder, "--policies", policies, "--out", tmp_path / "a.png", "--prompts")
    done = run_script(script, *map(str, asked), "flags france,apple", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{policies.split(',')[-1]}: 2 pictures" in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    done = run_script(script, *map(str, asked), "flags,aple", folder=tmp_path)
    assert done.returncode != 0
    assert "does not know 'aple'; did you mean 'apple'" in done.stderr
