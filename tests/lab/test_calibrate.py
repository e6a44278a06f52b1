"""Budgets of layers from measurements: the file, the schedule that reads it, and the search."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import BudgetError, Calibrated, ParameterError, PolicyCache, RasterLayout
from kvpolicy.budget.calibrated import LayerBudgets, read_layer_budgets
from kvpolicy.cli import app
from kvpolicy.lab.run.subject import Measurement, Metric
from kvpolicy.lab.search.calibrate import Curve, calibrate, share_out
from kvpolicy.parts.named import read_part

LAYOUT = RasterLayout(rows=8, cols=4, prefix=1)
SMALL = "linear/protect=anchors:1+lines:1"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "budgets.json"
    found = LayerBudgets(
        subject="toy",
        policy=SMALL,
        layout=repr(LAYOUT),
        budget=12,
        layers=[16, 9, 11],
        items=4,
        uniform=1.0,
        found=0.5,
    )
    path.write_text(found.text())
    return path


def test_a_file_is_a_schedule_for_any_policy_and_for_the_command_line(file):
    for policy in (SMALL, "h2o", "knorm"):
        for made in (
            PolicyCache(
                policy, 12, layout=LAYOUT, num_layers=3, schedule=Calibrated(file=str(file))
            ),
            PolicyCache(
                kvpolicy.create(f"{policy}/schedule=calibrated:{file}"),
                "12",
                layout=LAYOUT,
                num_layers=3,
            ),
        ):
            assert made.stats().budgets == (16, 9, 11)


def test_it_is_spelled_and_read_back(file):
    schedule = read_part("schedule", f"calibrated:{file}")
    assert schedule.parameters == Calibrated(file=str(file))
    assert str(schedule) == f"calibrated:{file}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": 13}, "for 12 tokens per layer, not 13"),
        ({"num_layers": 4}, "for 3 layers, not 4"),
        ({"layout": RasterLayout(rows=9, cols=4, prefix=1)}, "calibrate on this layout"),
        ({"policy": "linear/protect=anchors:3+lines:1"}, "this policy needs 11"),
    ],
)
def test_another_use_is_refused(file, changed, said):
    use = {"policy": SMALL, "budget": 12, "layout": LAYOUT, "num_layers": 3} | changed
    policy = kvpolicy.create(use.pop("policy"))
    with pytest.raises(BudgetError, match=said):
        PolicyCache(policy, schedule=Calibrated(file=str(file)), **use)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:40], "not JSON"),
        (lambda text: "[]", "no file of layer budgets"),
        (lambda text: text.replace("16", "17"), "37 tokens, not budget=12 times 3"),
        (lambda text: text.replace("16", "-16"), "layers.0=-16"),
        (lambda text: text.replace('"items"', '"item"'), "items is missing"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version=2"),
    ],
)
def test_a_damaged_file_is_named(file, damage, said):
    file.write_text(damage(file.read_text()))
    with pytest.raises(ParameterError, match=said) as caught:
        Calibrated(file=str(file))
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"none\.json can't be read"):
        read_layer_budgets(tmp_path / "none.json")


def test_tokens_go_where_they_are_worth_most():
    steep = Curve((4, 8, 32), (0.8, 0.1, 0.0))
    flat = Curve((4, 8, 32), (0.01, 0.009, 0.0))
    shares = share_out([flat, steep, flat], 36)
    assert sum(shares) == 36
    assert shares[1] > max(shares[0], shares[2])
    assert min(shares) >= 4
    with pytest.raises(BudgetError, match="12 to 96"):
        share_out([flat, steep, flat], 11)


class Known:
    """Losses that are known: layer 1 needs four times what the others need."""

    name = "known"
    layout = LAYOUT
    num_layers = 3
    metrics = (Metric(name="loss", label="loss", array="losses"),)
    seen_by_tests = True

    def measure(self, setting, seed, wanted):
        cache = PolicyCache(setting.policy, setting.budget, layout=LAYOUT, num_layers=3)
        tokens = cache.stats().budgets
        loss = sum(
            math.exp(-b / scale) - math.exp(-32 / scale)
            for b, scale in zip(tokens, (2, 8, 2), strict=True)
        )
        return Measurement({"losses": np.full(5, loss)}, SimpleNamespace())

    def calibration(self):
        aside = Known()
        aside.seen_by_tests = False
        return aside


def test_calibrate_finds_the_layer_that_needs_more(tmp_path):
    out, told = tmp_path / "budgets.json", []
    found = calibrate(
        Known(),
        kvpolicy.create(SMALL),
        "12",
        out,
        named=("known", SMALL),
        tell=lambda *args: told.append(args),
    )
    assert found == read_layer_budgets(out)
    assert sum(found.layers) == 36
    assert found.layers[1] > 14
    assert found.found < found.uniform == pytest.approx(dict(told)[12, 12, 12])
    assert min(found.layers) >= kvpolicy.create(SMALL).min_budget(LAYOUT)
    assert found.items == 5


def test_calibrate_measures_on_items_that_are_kept_aside(tmp_path, monkeypatch):
    measure, on = Known.measure, []
    monkeypatch.setattr(
        Known, "measure", lambda self, *a: on.append(self.seen_by_tests) or measure(self, *a)
    )
    calibrate(
        Known(),
        kvpolicy.create(SMALL),
        "12",
        tmp_path / "b.json",
        named=("known", SMALL),
        moves=0,
    )
    assert set(on) == {False}


@pytest.mark.slow
def test_the_command_writes_a_file_that_a_policy_takes(tmp_path):
    out = tmp_path / "budgets.json"
    arguments = ["calibrate", "--subject", "fashion-ar", "--policy", "streaming_llm"]
    arguments += ["--budget", "1/2", "--out", str(out), "--option", "scored=2"]
    result = CliRunner().invoke(app, [*arguments, "--moves", "0", "--threads", "1"])
    assert result.exit_code == 0, result.output
    fields = json.loads(out.read_text())
    assert sum(fields["layers"]) == 392 * 4
    assert fields["subject"] == "fashion-ar"
    layout = RasterLayout(rows=28, cols=28, prefix=1)
    policy = kvpolicy.create(f"streaming_llm/schedule=calibrated:{out}")
    cache = PolicyCache(policy, "1/2", layout=layout, num_layers=4)
    assert list(cache.stats().budgets) == fields["layers"]
