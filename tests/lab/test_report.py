"""The report, in a real browser: what it shows is what was recorded, and nothing in it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kvpolicy

pytest.importorskip("safetensors", reason="traces are safetensors files")
pytest.importorskip("plotly", reason="the report's plots need plotly")

from kvpolicy.lab.compare.comparison import Entry
from kvpolicy.lab.run.outputs import write_outputs
from kvpolicy.lab.run.plan import Plan
from kvpolicy.lab.run.run_folder import (
    CellRecord,
    CellStats,
    Environment,
    MetricInfo,
    RunFolder,
    SubjectInfo,
    open_run,
)
from kvpolicy.lab.show.report import report_on_run, report_on_trace
from kvpolicy.lab.show.report.page import _asked_for
from kvpolicy.lab.show.retention import retention
from kvpolicy.tracing.trace import STAYS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("KVPOLICY_REQUIRE_CHROMIUM")
HOSTILE = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>\"'`{{7*7}}"
ROWS, COLS, LAYERS = 6, 5, 2
LAYOUT = kvpolicy.RasterLayout(rows=ROWS, cols=COLS, prefix=2)
BITS = MetricInfo(name="bits", label="bits per pixel", array="bits", about="lower is better")
SPEED = MetricInfo(name="speed", label="images per second", better="higher", timing=True)
POLICIES = {
    "full": {},
    "linear": {"anchors": 3, "recent_lines": 1},
    "h2o": {},
    "streaming_llm": {"sinks": 2},
}

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED,
    reason="no Chromium on this machine (Debian's package chromium has one)",
)


def traced(name, budget):
    policy = kvpolicy.create(name, **POLICIES[name])
    cache = kvpolicy.PolicyCache(policy, budget, layout=LAYOUT, num_layers=LAYERS)
    torch.manual_seed(3)
    with kvpolicy.trace(cache) as recording:
        for _ in range(LAYOUT.length):
            for layer in range(LAYERS):
                query, key, value = torch.randn(3, 2, 2, 1, 8) * 2
                cache.attend(layer, query, key, value)
    images = torch.arange(2 * ROWS * COLS).view(2, ROWS, COLS).to(torch.uint8)
    return recording.finish(images)


def in_colour(path):
    """The viewer of a trace of pictures of three pixels a token, and of hostile prompts."""
    cache = kvpolicy.PolicyCache("h2o", 15, layout=LAYOUT, num_layers=1)
    torch.manual_seed(3)
    with kvpolicy.trace(cache) as recording:
        for _ in range(LAYOUT.length):
            cache.attend(0, *torch.randn(3, 2, 2, 1, 8))
    pictures = torch.randint(0, 256, (2, 3 * ROWS, 3 * COLS, 3), dtype=torch.uint8)
    recording.finish(pictures, ["a flag", HOSTILE]).save(path / "trace.safetensors")
    report_on_trace(path / "trace.safetensors", path / "report.html")
    return pictures, path / "report.html"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of four policies on a subject with a hostile name."""
    path = tmp_path_factory.mktemp("runs") / "first"
    plan = Plan(subject="toy", policies=list(POLICIES), budgets=["15"], trace=True)
    run = RunFolder.begin(path, plan)
    run.describe(
        Environment(
            versions={"kvpolicy": "0", "torch": HOSTILE},
            system=HOSTILE,
            processors=1,
            device="cpu",
            threads=1,
            executor="inline",
        ),
        SubjectInfo(
            name=HOSTILE,
            metrics=(BITS, SPEED),
            class_names=(HOSTILE, "b"),
            rows=ROWS,
            cols=COLS,
            prefix=2,
            num_layers=LAYERS,
        ),
    )
    generator = np.random.default_rng(0)
    common = generator.random(20)
    for number, cell in enumerate(plan.cells()):
        bits = common + 0.1 * number + 0.01 * generator.random(20)
        found = traced(cell.policy, None if cell.budget is None else int(cell.budget))
        record = CellRecord(
            cell=cell,
            id=cell.id,
            parameters={},
            metrics={"bits": float(bits.mean()), "speed": 9.0 - number},
            stats=CellStats(
                budgets=(30 - 5 * number,) * LAYERS,
                peak_tokens=(17,) * LAYERS,
                bytes=10**6 * (4 - number),
                overhead_bytes=1,
                evictions=(0,) * LAYERS,
            ),
            seconds=1.0,
        )
        images = generator.integers(0, 255, (2, ROWS, COLS)).astype(np.uint8)
        run.keep(record, {"bits": bits}, images, found.dump())
    failed = plan.cells()[1]
    run.fail(failed, HOSTILE, f"Traceback\n{HOSTILE}")
    return path


@pytest.fixture(scope="module", params=["1/2,15", "12,3 lines,1/2"])
def spelled(request, tmp_path_factory):
    """A run whose budgets mix shares, tokens and lines, two of them equal in tokens and bytes."""
    path = tmp_path_factory.mktemp("runs") / "mixed"
    budgets = request.param.split(",")
    plan = Plan(subject="toy", policies=["linear", "h2o"], budgets=budgets)
    run = RunFolder.begin(path, plan)
    run.describe(
        Environment(
            versions={}, system="", processors=1, device="cpu", threads=1, executor="inline"
        ),
        SubjectInfo(name="toy", metrics=(BITS,), num_layers=LAYERS),
    )
    common = np.random.default_rng(0).random(20)
    tokens = {None: ROWS * COLS, "1/2": 15, "15": 15, "12": 12, "3 lines": 15}
    for number, cell in enumerate(plan.cells()):
        held = tokens[cell.budget]
        bits = common + (0.1 + 0.01 * number) * (30 / held - 1)
        record = CellRecord(
            cell=cell,
            id=cell.id,
            parameters={},
            metrics={"bits": float(bits.mean())},
            stats=CellStats(
                budgets=(held,) * LAYERS,
                peak_tokens=(held + 2,) * LAYERS,
                bytes=1000 * (held + 2),
                overhead_bytes=1,
                evictions=(0,) * LAYERS,
            ),
            seconds=1.0,
        )
        run.keep(record, {"bits": bits})
    report_on_run(run, path / "report.html")
    return budgets, tokens, path


def points(text):
    """What each plot of a report draws: by policy, where each budget stands."""
    found = []
    for call in re.finditer(r"Plotly\.newPlot\(\s*\"[-0-9a-f]+\",\s*", text):
        traces, _ = json.JSONDecoder().raw_decode(text, call.end())
        found.append({t["name"]: dict(zip(t["text"], t["x"], strict=True)) for t in traces})
    return found


def test_budgets_that_are_spelled_differently_stand_on_one_axis(spelled):
    budgets, tokens, path = spelled
    text = (path / "report.html").read_text(encoding="utf-8")
    by_tokens, by_bytes = points(text)
    for policy in ("linear", "h2o"):
        assert by_tokens[policy] == {budget: tokens[budget] for budget in budgets}
        assert by_bytes[policy] == {b: (tokens[b] + 2) / 1000 for b in budgets}
    assert "tokens a head may hold" in text
    assert "share of the cache" not in text
    _, files = write_outputs(open_run(path), [BITS])
    assert "quality-budget.png" in {file.name for file in files}


@pytest.fixture(scope="module")
def report(folder):
    report_on_run(open_run(folder), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield started
        started.close()


def new_page(browser, **options):
    """One that waits for a machine that is busy with other tests."""
    opened = browser.new_page(**options)
    opened.set_default_timeout(180_000)
    return opened


@pytest.fixture
def page(browser, report):
    opened = new_page(browser, viewport={"width": 1280, "height": 720})
    opened.complaints, opened.requests = [], []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    assert opened.complaints == []
    opened.close()


def move_to(page, moment):
    page.evaluate(
        """(moment) => { const slider = document.getElementById("moment");
        slider.value = moment; slider.dispatchEvent(new Event("input")); }""",
        moment,
    )


def states(page, side="left"):
    return page.eval_on_selector_all(
        f"#{side} .grid i", "cells => cells.map(cell => cell.dataset.state)"
    )


def choose(page, selector, label):
    page.select_option(selector, label=label)


@needs_chromium
class TestInABrowser:
    def test_it_loads_alone_and_without_a_complaint(self, page, report):
        assert page.requests == [report.as_uri()]
        assert page.locator("#figures tbody tr").count() == len(POLICIES)
        assert page.locator(".charts .js-plotly-plot").count() == 2

    @pytest.mark.parametrize("name", ["linear", "h2o", "streaming_llm", "full"])
    def test_the_cells_are_the_traces(self, page, name):
        found = traced(name, None if name == "full" else 15)
        budget = "all" if name == "full" else "15"
        choose(page, "#left .policy", f"{name}, {budget}")
        for layer, head, item in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)):
            choose(page, "#layer", str(layer))
            choose(page, "#head", str(head))
            choose(page, "#item", str(item + 1))
            for moment in (0, 1, 14, 15, 16, 20, 23, ROWS * COLS):
                move_to(page, moment)
                held = found.layers[layer].held(moment + LAYOUT.prefix)[item, head]
                shown = states(page)
                for place, state in enumerate(shown):
                    if place >= moment:
                        assert state == "future"
                    else:
                        cached = state in ("anchor", "recent", "kept")
                        assert cached == held[place + LAYOUT.prefix], (moment, place, state)
                        assert cached or state in ("gone", "new-gone")

    def test_roles_of_linear(self, page):
        choose(page, "#left .policy", "linear, 15")
        move_to(page, 23)
        shown = states(page)
        assert shown[:3] == ["anchor"] * 3
        assert shown[15:23] == ["recent"] * 8  # the last whole line, and the current one
        assert shown[23:] == ["future"] * 7
        assert "kept" in shown[3:15]

    def test_choices_change_the_grid(self, page):
        move_to(page, 25)
        seen = set()
        for selector, label in (
            ("#left .policy", "h2o, 15"),
            ("#layer", "1"),
            ("#head", "1"),
            ("#item", "2"),
        ):
            choose(page, selector, label)
            seen.add(tuple(states(page)))
        assert len(seen) == 4
        choose(page, "#right .policy", "streaming_llm, 15")
        assert states(page, "right") != states(page)
        assert "layer 1, head 1: 15 of 25 tokens cached, and 2 pinned" in page.inner_text("#left")

    def test_the_slider_moves_the_grid_and_the_picture(self, page):
        pixels = """() => { const c = document.querySelector("#left .picture");
            return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
        move_to(page, 7)
        before = states(page)
        assert before.count("future") == ROWS * COLS - 7
        shown = np.array(page.evaluate(pixels)).reshape(-1, 4)
        assert (shown[:7, 3] == 255).all()
        assert (shown[7:, 3] == 0).all()
        assert shown[:7, 0].tolist() == list(range(7))
        page.focus("#moment")
        page.keyboard.press("ArrowRight")
        assert states(page).count("future") == ROWS * COLS - 8
        page.keyboard.press("ArrowUp")
        assert states(page).count("future") == ROWS * COLS - 13

    def test_pictures_in_colour_come_token_by_token_beside_their_prompts(self, browser, tmp_path):
        pictures, path = in_colour(tmp_path)
        page = new_page(browser)
        page.goto(path.as_uri())
        choose(page, "#item", f"2: {HOSTILE}")
        move_to(page, COLS + 2)
        values, size = page.evaluate(
            """() => { const c = document.querySelector("#left .picture");
            return [[...c.getContext("2d").getImageData(0, 0, c.width, c.height).data],
                    [c.height, c.width, 4]]; }"""
        )
        page.close()
        shown = np.array(values).reshape(size)
        come = np.zeros((ROWS, COLS), bool)
        come.flat[: COLS + 2] = True
        come = come.repeat(3, axis=0).repeat(3, axis=1)
        assert shown.shape[:2] == come.shape == tuple(pictures.shape[1:3])
        assert ((shown[..., 3] == 255) == come).all()
        assert (shown[come][:, :3] == pictures[1].numpy()[come]).all()

    def test_keys_without_a_mouse(self, page):
        move_to(page, 10)
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("ArrowLeft")
        assert states(page).count("future") == ROWS * COLS - 9
        page.keyboard.press(" ")
        page.wait_for_timeout(400)
        page.keyboard.press(" ")
        after = states(page).count("future")
        assert after < ROWS * COLS - 9
        page.wait_for_timeout(200)
        assert states(page).count("future") == after
        page.focus("#left .grid")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        about = page.inner_text("#left .about")
        assert f"position {1 + COLS + 2}, row 1, column 1" in about

    def test_a_cell_tells_its_score_and_age(self, page):
        found = traced("linear", 15).layers[0]
        choose(page, "#left .policy", "linear, 15")
        move_to(page, 23)
        page.hover("#left .grid i[data-place='16']")
        about = page.inner_text("#left .about")
        assert "recent: position 18, row 3, column 1, age 7" in about
        newest = int((found.decided <= 25).nonzero().max())
        begun = int(found.candidates[:newest].sum())
        at = slice(begun, begun + int(found.candidates[newest]))
        where = (found.places[0, 0, at] == 18).nonzero()
        score = found.scores[0, 0, at][where].item()
        assert f"score {score:.3g}"[:10] in about
        assert f"the decision before token {int(found.decided[newest])}" in about

    def test_sorting(self, page):
        def order():
            return page.eval_on_selector_all(
                "#figures tbody th", "cells => cells.map(cell => cell.dataset.value)"
            )

        heads = page.locator("#figures thead button")
        heads.nth(0).click()
        assert order() == sorted(POLICIES)
        heads.nth(0).click()
        assert order() == sorted(POLICIES, reverse=True)
        heads.nth(2).click()
        assert order() == list(POLICIES)
        heads.nth(3).click()
        assert order() == list(reversed(POLICIES))

    def test_what_comes_from_outside_is_text(self, page):
        page.wait_for_timeout(300)
        assert page.evaluate("window.ran") is None
        assert HOSTILE in page.inner_text("h1")
        assert page.locator("img[src='x']").count() == 0
        page.click("summary >> nth=0")
        assert "window.ran=1" in page.inner_text("pre >> nth=0")

    @pytest.mark.parametrize("width", [390, 1280])
    def test_it_fits_the_screen(self, browser, report, width):
        opened = new_page(browser, viewport={"width": width, "height": 844})
        opened.goto(report.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        opened.close()

    def test_a_report_of_one_trace(self, browser, tmp_path):
        traced("linear", 15).save(tmp_path / "t.safetensors")
        report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
        opened = new_page(browser)
        complaints = []
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto((tmp_path / "t.html").as_uri())
        assert opened.locator(".grid").count() == 1
        assert opened.locator(".grid i").count() == ROWS * COLS
        assert not complaints
        opened.close()


def behind(found, prompt):
    """The same image behind a prompt that is longer by so many tokens."""

    def later(positions):
        return torch.where((positions >= 0) & (positions < STAYS), positions + prompt, positions)

    layer = found.layers[0]
    kept = torch.full((*layer.gone.shape[:2], prompt), STAYS, dtype=torch.int32)
    moved = {name: later(getattr(layer, name)) for name in ("decided", "victims", "places")}
    moved["gone"] = torch.cat([kept, later(layer.gone)], -1)
    grid = found.grid | {"prefix": found.grid["prefix"] + prompt}
    layers = {0: replace(layer, **moved)}
    return replace(found, grid=grid, seen=found.seen + prompt, layers=layers)


@needs_chromium
def test_positions_take_all_sixteen_bits(browser, tmp_path):
    """Behind 32,767 they once were negative, and scores vanished."""
    near = traced("linear", 15)
    said = []
    for prompt in (0, 40_000):
        behind(near, prompt).save(tmp_path / "t.safetensors")
        report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
        opened = new_page(browser)
        opened.goto((tmp_path / "t.html").as_uri())
        move_to(opened, 23)
        opened.hover("#left .grid i[data-place='16']")
        said.append(opened.inner_text("#left .about"))
        opened.close()
    assert "score " in said[0]
    score = [re.search(r"score \S+", text)[0] for text in said]
    assert score[0] == score[1]
    assert f"position {18 + 40_000}, row 3, column 1" in said[1]


def test_a_trace_that_is_too_long_for_the_viewer_is_refused_by_its_length(tmp_path):
    behind(traced("linear", 15), 2**16).save(tmp_path / "t.safetensors")
    with pytest.raises(kvpolicy.ParameterError, match="longer than the viewer can show: 65,534"):
        report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")


@needs_chromium
def test_a_hostile_name_in_a_trace_is_text(browser, tmp_path):
    hostile = replace(traced("linear", 15), policy=HOSTILE)
    hostile.save(tmp_path / "t.safetensors")
    report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
    opened = new_page(browser)
    opened.goto((tmp_path / "t.html").as_uri())
    opened.wait_for_timeout(200)
    assert opened.evaluate("window.ran") is None
    chosen = "document.querySelector('#left .policy').selectedOptions[0].text"
    assert " ".join(HOSTILE.split()) in opened.evaluate(chosen)
    assert HOSTILE in opened.inner_text("h1")
    opened.close()


@needs_chromium
def test_the_viewer_shows_what_was_staged_and_rejected(browser, tmp_path):
    policy = kvpolicy.create("linear", **POLICIES["linear"])
    cache = kvpolicy.PolicyCache(policy, 15, layout=LAYOUT, num_layers=1)
    chance = torch.Generator().manual_seed(3)
    with kvpolicy.trace(cache) as recording:
        cache.attend(0, *torch.randn(3, 1, 1, 2, 8, generator=chance))
        with cache.stage(6):
            for accepted in (4, 1, 6, 2):
                cache.attend(0, *torch.randn(3, 1, 1, 6, 8, generator=chance))
                cache.commit(accepted)
    recording.save(tmp_path / "t.safetensors")
    report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
    opened = new_page(browser)
    opened.goto((tmp_path / "t.html").as_uri())
    move_to(opened, 5)
    # Pass 2 staged tokens 4 to 9 of the image, and accepted the first.
    assert states(opened)[5:11] == ["rejected"] * 5 + ["future"]
    assert "pass 2 of 4 accepted 1 of 6 staged" in opened.inner_text("#left")
    move_to(opened, 11)
    assert states(opened)[11] == "future"  # pass 3 accepted all
    move_to(opened, 0)
    assert "rejected" not in states(opened)
    opened.click('#left .grid i[data-place="3"]', force=True)
    move_to(opened, 8)
    assert "accepted in pass 1" in opened.inner_text("#left .about")
    assert "staged in the same pass" in opened.inner_text(".legend")
    opened.close()


GROUPED = kvpolicy.OrderedLayout.locality_aware(
    kvpolicy.RasterLayout(rows=ROWS, cols=COLS, line_break=1, prefix=2), 8
)


def traced_in_groups(name="near", budget=14):
    """A trace of groups, each asked for by queries that are taken back."""
    policy = kvpolicy.create(name, **({"anchors": 3} if name == "near" else {}))
    cache = kvpolicy.PolicyCache(policy, budget, layout=GROUPED, num_layers=1)
    chance = torch.Generator().manual_seed(3)
    with kvpolicy.trace(cache) as recording:
        new = GROUPED.prefix
        for ask in GROUPED.groups:
            visible = torch.ones(1, 1, new + ask, cache.seen + new + ask, dtype=torch.bool)
            visible[..., :new, cache.seen + new :] = False
            with cache.stage(new + ask):
                query, key, value = torch.randn(3, 1, 1, new + ask, 8, generator=chance)
                cache.attend(0, query, key, value, visible=visible)
                cache.commit(new)
            new = ask
    return recording.finish()


@needs_chromium
@pytest.mark.parametrize("name", ["near", "h2o"])
def test_groups_light_up_as_they_come(browser, tmp_path, name):
    """Cells are places of the grid, in any order; what queries ask for is never shown as cached."""
    found = traced_in_groups(name)
    found.save(tmp_path / "t.safetensors")
    assert bool((found.layers[0].gone < 2**31 - 1).any())
    report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
    opened = new_page(browser)
    opened.goto((tmp_path / "t.html").as_uri())
    assert len(states(opened)) == ROWS * (COLS + 1)
    ends = np.cumsum((0, *GROUPED.groups))
    for number in range(len(GROUPED.groups)):
        end = int(ends[number])
        # Any moment within a group shows all of it.
        for moment in {end, int(ends[number - 1]) + 1} if number else {0}:
            move_to(opened, moment)
            shown = states(opened)
            held = found.layers[0].held(end + 2)[0, 0, 2:]
            for came, place in enumerate(GROUPED.order):
                state = shown[place]
                if came < end:
                    cached = state in ("anchor", "recent", "kept", "newest")
                    assert cached == held[came], (moment, came, state)
                    assert cached or state in ("gone", "new-gone")
                    newest = int(ends[number - 1]) <= came
                    assert (state == "newest") == (newest and cached)
                else:
                    assert state == ("asked" if came < ends[number + 1] else "future")
            told = f"group {number} of 8" if number else "group 0 of 8"
            assert told in opened.inner_text("#moment-text")
            asked = f"pass {number + 1} of 8 asked for {GROUPED.groups[number]} more"
            assert asked in opened.inner_text("#left .count")
    move_to(opened, int(ends[3]))
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#moment-text").startswith(f"{ends[4]} tokens, group 4")
    opened.keyboard.press("ArrowLeft")
    assert opened.inner_text("#moment-text").startswith(f"{ends[3]} tokens, group 3")
    place = GROUPED.order[int(ends[2])]
    opened.click(f'#left .grid i[data-place="{place}"]', force=True)
    about = opened.inner_text("#left .about")
    assert f"position {ends[2] + 2}, row {place // 6}, column {place % 6}" in about
    assert "cached in pass 4" in about
    assert "asked for in this pass" in opened.inner_text(".legend")
    assert "rejected" not in opened.inner_text(".legend")
    opened.close()


def test_retention_lies_on_the_grid_whatever_the_order():
    found = traced_in_groups()
    moment = sum(GROUPED.groups[:5])
    (shares,) = retention(found, [moment])[:, 0]
    held = found.layers[0].held(moment + 2)[0, 0, 2:]
    expected = np.zeros(ROWS * (COLS + 1))
    expected[list(GROUPED.order[:moment])] = held.numpy()
    assert 0 < expected.sum() < moment
    np.testing.assert_array_equal(shares, expected.reshape(ROWS, COLS + 1)[:, :COLS])


def test_nothing_is_linked(report):
    text = re.sub(r"<script>.*?</script>", "", report.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text):
        assert link.startswith(("data:", "#", "x")), link


def test_hostile_names_are_escaped_in_the_file(report):
    text = report.read_text(encoding="utf-8")
    assert "<script>window.ran" not in text
    assert "<img src=x" not in text


def test_without_a_grid_there_is_nothing_to_show(tmp_path):
    cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(), num_layers=1)
    with kvpolicy.trace(cache) as recording:
        cache.attend(0, *torch.randn(3, 1, 1, 12, 4))
    recording.save(tmp_path / "t.safetensors")
    with pytest.raises(kvpolicy.ParameterError, match="has no grid"):
        report_on_trace(tmp_path / "t.safetensors", tmp_path / "t.html")
    assert not (tmp_path / "t.html").exists()


def test_above_a_picture_stands_what_it_was_asked_to_show():
    def entry(**scores):
        cell = SimpleNamespace(scores=lambda: scores)
        return Entry("full", None, (cell,), {})

    prompts = ("a moon", "a flag", "no words")
    assert _asked_for([entry(classes=np.array([2, 0]))], prompts) == ["no words", "a moon"]
    assert _asked_for([entry(bits=np.zeros(2))], prompts) == prompts  # classes in turn
    assert _asked_for([entry(classes=np.array([2, 0]))], ()) == ()


def test_a_run_without_a_finished_cell(tmp_path):
    run = RunFolder.begin(tmp_path / "r", Plan(subject="toy", policies=["full"]))
    with pytest.raises(kvpolicy.ParameterError, match="no finished cell"):
        report_on_run(run, tmp_path / "r.html")


def test_retention_is_the_share_of_heads_in_the_trace():
    found = traced("linear", 15)
    shares = retention(found, [14, 23, 30], item=1)
    assert shares.shape == (3, LAYERS, ROWS, COLS)
    for number, moment in enumerate((14, 23, 30)):
        for layer in range(LAYERS):
            held = found.layers[layer].held(moment + 2)[1, :, 2:].double().mean(0).numpy()
            shown = shares[number, layer].ravel()
            assert (shown[:moment] == held[:moment]).all()
            assert not shown[moment:].any()
    one = retention(found, [23], item=1, head=0)
    assert set(np.unique(one)) == {0.0, 1.0}
    for wrong in ({"item": 2}, {"head": 2}, {"moments": [31]}):
        options = {"moments": [3]} | wrong
        with pytest.raises(kvpolicy.ParameterError):
            retention(found, **options)


def test_a_run_with_traces_draws_what_is_retained(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    _, files = write_outputs(open_run(copy), [BITS, SPEED])
    assert {"retention-15.png", "retention-15.svg"} <= {file.name for file in files}
