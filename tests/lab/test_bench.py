"""kvpolicy bench: sessions, rounds, figures and files. Nothing here says how fast anything is.

kvpress needs an environment that pip makes from a package index, and LlamaGen a checkout: what they
share with the workers tested here is the protocol.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_library import needs_compiler
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from kvpolicy import BudgetError, ParameterError, RasterLayout, UnknownNameError
from kvpolicy.cli import app
from kvpolicy.lab.bench.contender import (
    BASELINES,
    SHAPES,
    Contender,
    Dimensions,
    Workload,
    load_shape,
)
from kvpolicy.lab.bench.fit import Largest, largest_batch
from kvpolicy.lab.bench.machine import Machine
from kvpolicy.lab.bench.peers import OWN_WORKER, PeerError, PeerSession
from kvpolicy.lab.bench.report import grids, markdown, plot
from kvpolicy.lab.bench.rounds import Block, Plan, Rounds, lines_of_round
from kvpolicy.lab.bench.run import Bench, capacity_of, enlist, plan_of
from kvpolicy.lab.bench.session import LocalSession
from kvpolicy.lab.bench.summary import Summary, summarise
from kvpolicy.ops.cpu import native

SHAPE = "llamagen-b"
TINY = Workload(SHAPE, 1, "1/6", 97, 1, "cpu", "float32", 0)
EIGHT = Workload(SHAPE, 8, "1/6", 97, 1, "cpu", "float32", 0)
MACHINE = Machine("a processor", 2, 1, "2", "3", copy=1e9, matmul=1e12)
#: Bytes of one token's key and value in the tiny model's layer.
TOKEN = 2 * 768 * 4


@pytest.fixture(scope="module")
def model():
    return load_shape(SHAPE, layers=1, dtype=torch.float32, device="cpu", seed=0)


def session(model, contender, workload=TINY):
    return LocalSession(model, contender, workload)


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES.names())
def test_every_shape_that_is_listed_is_known(name):
    SHAPES.get(name)


@pytest.mark.parametrize(
    ("name", "parameters", "length"),
    [
        # Parameters that a step reads, from the projects' own figures: 111 M (table 1 of LlamaGen,
        # less the class table), 775 M, 1.4 B; 7 B language models.
        ("llamagen-b", 0.098e9, 577),
        ("llamagen-xl", 0.76e9, 577),
        ("llamagen-xxl", 1.39e9, 577),
        ("janus-pro-1b", 1.27e9, 608),
        ("janus-pro-7b", 6.1e9, 608),
        ("lumina-768", 6.7e9, 2384),
        ("lumina-1024", 6.7e9, 4192),
    ],
)
def test_shapes_have_the_models_real_sizes(name, parameters, length):
    from kvpolicy_adapters.bench.shapes import SHAPES as known

    dimensions, layout = known[name]
    assert dimensions.step_weights == pytest.approx(parameters, rel=0.03)
    assert layout.length == length


def test_the_model_has_the_weights_that_its_dimensions_say(model):
    embedding = model.model.get_input_embeddings().weight.numel()
    matrices = [p.numel() for p in model.model.parameters() if p.ndim == 2]
    assert sum(matrices) - embedding == model.dimensions.step_weights


def test_unknown_names_and_sizes():
    with pytest.raises(UnknownNameError, match="llamagen-b"):
        load_shape("llamagen", layers=None, dtype=torch.float32, device="cpu", seed=0)
    with pytest.raises(ParameterError, match="layers=13: llamagen-b has 12"):
        load_shape(SHAPE, layers=13, dtype=torch.float32, device="cpu", seed=0)


# -- sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "read", "held"),
    [
        (Contender("dynamic", "dynamic"), 1 + 24, 1 + 24),
        (Contender("static", "static"), 577, 577),
        (Contender("floor", "floor"), 97, 97),
        (Contender("skip", "skip"), 0, 0),
        (Contender("linear", "policy", "linear"), 1 + 24, 97),
    ],
)
def test_what_a_session_reads_and_holds(model, contender, read, held):
    run = session(model, contender)
    run.restart()
    seconds, tokens = run.run(24)
    assert len(seconds) == 24
    assert min(seconds) > 0
    assert tokens[-1] == read
    assert run.cache_bytes() == held * TOKEN
    run.close()


class Reads(TorchDispatchMode):
    """Where the tensors lie that are summed whole."""

    def __init__(self):
        super().__init__()
        self.at = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.sum.default:
            self.at.add(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "static", "floor", "skip"])
def test_waking_reads_all_weights_and_all_of_the_cache(model, kind):
    contender = Contender(kind, kind) if kind in BASELINES else Contender(kind, "policy", kind)
    run = session(model, contender)
    run.restart()
    run.run(24)
    with Reads() as reads:
        run.wake()
    weights = {weight.data_ptr() for weight in model.model.parameters()}
    assert weights < reads.at or (kind == "skip" and weights <= reads.at)
    cached = [tensor for tensor in run.decoder.cached() if tensor.data_ptr() in reads.at]
    assert sum(tensor.nbytes for tensor in cached) == run.cache_bytes()
    run.close()


def test_contenders_share_weights_and_nothing_else(model):
    twin = model.twin()
    ours = dict(model.model.named_parameters())
    assert all(p.data_ptr() == ours[n].data_ptr() for n, p in twin.named_parameters())
    assert twin.config is not model.model.config


def test_a_cache_that_holds_all_gives_what_the_others_give(model):
    """The same tokens at the same positions: full, dynamic and static agree on the logits."""
    logits = {}
    for name in ("full", "dynamic", "static"):
        kind = "policy" if name == "full" else name
        run = session(model, Contender(name, kind, policy="full" if name == "full" else ""))
        run.restart()
        run.run(30)
        with torch.inference_mode():
            logits[name] = run.decoder.step(run.tokens[:, 31:32])
        run.close()
    torch.testing.assert_close(logits["full"], logits["dynamic"])
    torch.testing.assert_close(logits["static"], logits["dynamic"])


def test_the_floor_attends_to_what_it_was_given(model):
    """With as many slots as tokens, the floor is a full cache."""
    workload = Workload(**{**TINY.as_dict(), "capacity": 31})
    run = session(model, Contender("floor", "floor"), workload)
    full = session(model, Contender("dynamic", "dynamic"))
    for each in (run, full):
        each.restart()
        each.run(29)
    with torch.inference_mode():
        ours, theirs = (each.decoder.step(run.tokens[:, 30:31]) for each in (run, full))
    torch.testing.assert_close(ours, theirs)
    run.close()


@pytest.mark.parametrize("name", ["dynamic", "static", "floor", "skip", "linear"])
def test_a_session_that_skips_is_where_one_that_decodes_is(model, name):
    kind = name if name in BASELINES else "policy"
    contender = Contender(name, kind, policy="" if kind == name else name)
    skipped, decoded = session(model, contender), session(model, contender)
    for each, go in ((skipped, skipped.skip), (decoded, decoded.run)):
        each.restart()
        go(24 * 6)
    assert skipped.run(2)[1] == decoded.run(2)[1]
    assert skipped.cache_bytes() == decoded.cache_bytes()
    lengths = [each.decoder.cache.get_seq_length() for each in (skipped, decoded)]
    assert int(lengths[0]) == int(lengths[1]) == 1 + 24 * 6 + 2
    skipped.release()
    skipped.restart()
    assert skipped.run(1)[1][0] == {"static": 577, "floor": 97, "skip": 0}.get(name, 2)


@pytest.mark.parametrize("kind", ["floor", "skip"])
def test_a_compiled_floor_is_compiled_once_and_gives_the_same(model, kind, monkeypatch):
    counter = CompileCounter()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, backend=counter, **how))
    torch._dynamo.reset()
    compiled = session(model, Contender("c", kind, compiled=True))
    eager = session(model, Contender("e", kind))
    for _ in range(2):
        for each in (compiled, eager):
            each.restart()
            each.skip(24 * 4)
            each.run(5)
        with torch.inference_mode():
            ours, theirs = (e.decoder.step(e.tokens[:, 102:103]) for e in (compiled, eager))
        torch.testing.assert_close(ours, theirs)
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_there_may_be_more_compiled_contenders_than_torch_compiles_one_function_for(
    model, monkeypatch
):
    plain = torch.compile

    @functools.wraps(plain)  # its parameters are looked at
    def traced(function, **how):
        return plain(function, backend="eager", **how)

    if "isolate_recompiles" not in inspect.signature(plain).parameters:
        pytest.skip("this torch counts all of them together")
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for kind in ("skip", "floor", "static"):
            run = session(model, Contender(kind, kind, compiled=True))
            run.restart()
            run.run(2)
            run.close()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_skip_still_makes_keys_and_values(model):
    """Or what a cache costs would seem to include two products of each layer."""
    torch._dynamo.reset()
    run = session(model, Contender("skip", "skip", compiled=True))
    run.restart()
    with torch.inference_mode():
        _, sources = run_and_get_code(run.decoder.step, run.tokens[:, 1:2])
    (source,) = sources
    assert source.count("extern_kernels.mm(") == 7 + 1  # of a layer, and the head
    torch._dynamo.reset()


@needs_compiler
def test_a_skinny_contender_multiplies_by_the_kernel_until_it_is_closed(model, kernel, monkeypatch):
    rows = []
    product = native.linear()
    counted = lambda x, *rest: rows.append(x.shape[0]) or product(x, *rest)  # noqa: E731
    monkeypatch.setattr(native, "linear", lambda: counted)
    run = session(model, Contender("static", "static", skinny=True), EIGHT)
    run.restart()
    run.run(1)
    assert rows
    assert set(rows) == {8}
    run.close()
    rows.clear()
    with torch.inference_mode():
        run.decoder.model(run.tokens[:, :1])
    assert not rows


def test_a_policy_that_a_budget_is_too_small_for(model):
    workload = Workload(**{**TINY.as_dict(), "budget": "8", "capacity": 9})
    with pytest.raises(BudgetError, match="linear"):
        session(model, Contender("linear", "policy", "linear"), workload)


# -- rounds ------------------------------------------------------------------------------------


class Fake:
    """A session whose steps take given seconds, and that may be interrupted."""

    def __init__(self, name, kind, seconds, interrupt_at=None):
        self.contender = Contender(name, kind, policy=name if kind == "policy" else "")
        self.seconds, self.interrupt_at = seconds, interrupt_at
        self.log, self.runs, self.at, self.awake = [], 0, 0, False

    def restart(self):
        self.at = 0

    def run(self, count):
        if self.runs == self.interrupt_at:
            raise KeyboardInterrupt
        assert self.awake, "nobody's first step is slower for what others did before"
        self.awake = False
        self.runs += 1
        line = self.at // count
        self.at += count
        self.log.append(line)
        return [self.seconds(line)] * count, [7.0] * count

    def skip(self, count):
        self.at += count

    def wake(self):
        self.awake = True

    def cache_bytes(self):
        return 5

    def release(self):
        self.log.append("released")

    def close(self):
        pass


def test_lines_of_a_round():
    plan = Plan(lines=10, line_length=4, rounds=3, every=3)
    assert lines_of_round(plan, 0) == [0, 3, 6, 9]
    assert lines_of_round(plan, 1) == [0, 1, 4, 7, 9]
    assert lines_of_round(Plan(lines=3, line_length=4, rounds=1), 0) == [0, 1, 2]


def test_contenders_take_turns_line_by_line_and_begin_in_turn():
    calls = []
    fakes = [Fake(name, "policy", lambda line: 1.0) for name in "ab"]
    for fake in fakes:
        whole = fake.run
        fake.run = lambda count, whole=whole, name=fake.contender.name: (
            calls.append(name),
            whole(count),
        )[1]
    rounds = Rounds(fakes, Plan(lines=3, line_length=2, rounds=1), lambda count: None)
    rounds.run()
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert rounds.finished == 1
    assert rounds.plan.measured * 2 == len(rounds.blocks) == 6


def test_what_is_skipped_is_not_run():
    fake = Fake("a", "policy", lambda line: 1.0)
    Rounds([fake], Plan(lines=7, line_length=2, rounds=1, every=3), lambda count: None).run()
    assert fake.log == [0, 3, 6]


def test_whole_images_hold_one_cache_at_a_time():
    fakes = [Fake(name, "policy", lambda line: 1.0) for name in "ab"]
    plan = Plan(lines=2, line_length=2, rounds=2, whole_images=True)
    rounds = Rounds(fakes, plan, lambda count: None)
    rounds.run()
    assert all(fake.log == [0, 1, "released"] * 2 for fake in fakes)
    assert len(rounds.blocks) == 8


def test_an_interrupt_keeps_what_is_finished():
    kept = []
    fakes = [Fake("a", "policy", lambda line: 1.0), Fake("floor", "floor", lambda line: 1.0, 5)]
    plan = Plan(lines=4, line_length=2, rounds=3)
    rounds = Rounds(fakes, plan, lambda count: None)
    rounds.run(lambda: kept.append(len(rounds.blocks)))
    assert rounds.interrupted
    assert rounds.finished == 1
    assert kept == [8]
    assert len(rounds.blocks) == 10  # the line that was interrupted does not count
    summary = figures_of(rounds, plan)
    assert summary.figures[0].step == 1.0


def test_the_first_round_is_whole_even_if_time_is_up():
    fake = Fake("a", "policy", lambda line: 1.0)
    rounds = Rounds([fake], Plan(lines=4, line_length=2, rounds=9, minutes=0), lambda count: None)
    rounds.run()
    assert rounds.finished == 1
    assert len(rounds.blocks) == 4


# -- figures -----------------------------------------------------------------------------------


def figures_of(rounds, plan, capacity=5, prefix=1):
    return summarise(
        rounds.blocks,
        [each.contender for each in rounds.sessions],
        plan=plan,
        workload=Workload(SHAPE, 2, "4", capacity, 1, "cpu", "float32", 0),
        dimensions=Dimensions(8, 1, 2, 1, 4, 16, 32),
        prefix=prefix,
        machine=MACHINE,
        cache_bytes=rounds.cache_bytes,
        memory={"linear": 123},
    )


@pytest.fixture
def measured():
    """linear: 2 ms, but 3 in the first line; dynamic: 4 ms and 1 more a line; floor 1.9; skip 1."""
    fakes = [
        Fake("linear", "policy", lambda line: 3.0 if line == 0 else 2.0),
        Fake("dynamic", "dynamic", lambda line: 4.0 + line),
        Fake("floor", "floor", lambda line: 1.9),
        Fake("skip", "skip", lambda line: 1.0),
    ]
    plan = Plan(lines=10, line_length=2, rounds=3, every=2)
    rounds = Rounds(fakes, plan, lambda count: None)
    rounds.run()
    return rounds, plan, figures_of(rounds, plan)


def test_figures_of_known_times(measured):
    _, _, summary = measured
    linear, dynamic, floor, skip = summary.figures
    assert linear.image == pytest.approx((3 + 9 * 2) * 2)
    assert dynamic.image == pytest.approx(sum(4 + line for line in range(10)) * 2)
    assert linear.cache == pytest.approx(1.1)
    assert skip.cache == pytest.approx(0)
    # Four evictable slots are two lines: the dear first line does not count.
    assert linear.overhead.value == pytest.approx(2 / 1.9 - 1)
    assert linear.flat == pytest.approx(0)
    assert dynamic.flat == pytest.approx(13 / 6 - 1)
    assert dynamic.flat_to_floor == pytest.approx(13 / 6 - 1)
    assert floor.overhead.value == pytest.approx(0)
    assert linear.memory == 123
    ratio = summary.faster["linear", "dynamic"]
    # Rounds that leave line 1 out put it half way between its neighbours.
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((85 / 21, 85 / 21.5, 85 / 21))
    assert summary.cheaper["linear", "dynamic"].value == pytest.approx((85 - 10) / (21 - 10))


def test_each_is_compared_with_a_floor_and_a_skip_that_run_as_it_does():
    plan = Plan(lines=10, line_length=2, rounds=1)
    times = {"linear": 3.0, "linear skinny": 2.0, "floor": 2.5, "floor skinny": 1.6, "skip": 2.0}
    times |= {"skip skinny": 1.0, "linear compiled": 1.5}
    fakes = []
    for name, seconds in times.items():
        base, *how = name.split()
        fake = Fake(base, "policy" if base == "linear" else base, lambda line, s=seconds: s)
        fake.contender = replace(
            fake.contender, name=name, skinny="skinny" in how, compiled="compiled" in how
        )
        fakes.append(fake)
    rounds = Rounds(fakes, plan, lambda count: None)
    rounds.run()
    plain, skinny, *_, compiled = figures_of(rounds, plan).figures
    assert plain.cache == pytest.approx(1.0)
    assert plain.overhead.value == pytest.approx(3 / 2.5 - 1)
    assert skinny.cache == pytest.approx(1.0)
    assert skinny.overhead.value == pytest.approx(2 / 1.6 - 1)
    assert (compiled.cache, compiled.overhead) == (None, None)


def test_what_a_peers_cache_costs_is_told_by_its_own_skip():
    """Its transformers is another one: all else in its step may take another time."""
    fakes = [
        Fake("linear", "policy", lambda line: 3.0),
        Fake("skip", "skip", lambda line: 2.0),
        Fake("kvpress knorm", "peer", lambda line: 4.0),
        Fake("kvpress skip", "skip", lambda line: 1.0),
        Fake("llamagen official", "peer", lambda line: 9.0),
        Fake("floor", "floor", lambda line: 2.5),
    ]
    for fake in fakes:
        whose = fake.contender.name.split()[0]
        if whose in ("kvpress", "llamagen"):
            fake.contender = replace(fake.contender, peer=whose)
    rounds = Rounds(fakes, Plan(lines=10, line_length=2, rounds=1), lambda count: None)
    rounds.run()
    summary = figures_of(rounds, rounds.plan)
    ours, _, theirs, _, official, _ = summary.figures
    assert ours.cache == pytest.approx(1.0)
    assert theirs.cache == pytest.approx(3.0)
    assert theirs.overhead.value == pytest.approx(4 / 2.5 - 1)
    assert summary.cheaper["linear", "kvpress knorm"].value == pytest.approx(3.0)
    assert official.cache is None  # nobody has left its attention out
    assert ("linear", "llamagen official") not in summary.cheaper
    assert ("linear", "kvpress skip") not in summary.faster


def test_bytes_and_roofline(measured):
    _, _, summary = measured
    weights = 8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16 + 8 * 32
    read = weights * 4 + 2 * (2 * 1 * 1 * 4 * 7) * 4  # batch of 2, 7 tokens, keys and values
    assert summary.figures[0].bytes_read == read
    flops = 2 * (2 * weights + 4 * 2 * 4 * 7)
    assert summary.figures[0].roofline == max(read / 1e9, flops / 1e12)


def test_the_spread_is_that_of_the_rounds():
    plan = Plan(lines=4, line_length=1, rounds=3)
    blocks = [
        Block(number, line, name, [seconds], [1.0])
        for number, factor in enumerate((1.0, 1.1, 0.9))
        for line in range(4)
        for name, seconds in (("linear", 1.0), ("dynamic", 2.0 * factor))
    ]
    rounds = Rounds([Fake("linear", "policy", None), Fake("dynamic", "dynamic", None)], plan, print)
    rounds.blocks = blocks
    ratio = figures_of(rounds, plan).faster["linear", "dynamic"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 1.8, 2.2))


def test_tables_and_plot(measured, tmp_path):
    rounds, plan, summary = measured
    contenders = [each.contender for each in rounds.sessions]
    text = markdown(grids(summary, contenders), ["a fact"], "kvpolicy bench")
    assert "| linear | 2000.00 | 42.0 | 1100.00 | +5.3% [+5.3%, +5.3%] | +0.0% | +0.0% |" in text
    assert "| linear | 4.05 [3.95, 4.05] |" in text
    figure = plot(summary, Workload(SHAPE, 2, "4", 5, 1, "cpu", "float32", 0), plan, 1)
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["dynamic"])[-1] == 13_000


def test_no_two_lines_of_a_plot_look_alike():
    policies = [f"policy {number}" for number in range(14)]
    fakes = [Fake(name, "policy", lambda line: 2.0) for name in policies]
    fakes += [Fake(f"peer {number}", "peer", lambda line: 3.0) for number in range(4)]
    for kind in ("floor", "skip"):
        fakes += [Fake(f"{kind} {number}", kind, lambda line: 1.0) for number in range(4)]
    rounds = Rounds(fakes, Plan(lines=10, line_length=2, rounds=1), lambda count: None)
    rounds.run()
    summary = figures_of(rounds, rounds.plan)
    figure = plot(summary, Workload(SHAPE, 2, "4", 5, 1, "cpu", "float32", 0), rounds.plan, 1)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    looks = {
        (line.get_color(), line.get_marker(), str(line._dash_pattern), line.get_linestyle())
        for name, line in lines.items()
        if name in summary.by_line
    }
    assert len(looks) == len(fakes)


class Recording(PeerSession):
    """A watched session without a process: notes what it is told, and has grown by so much."""

    def __init__(self, done, grown):
        self.done, self.grown = done, grown

    def restart(self):
        self.done.append("restart")

    def run(self, count):
        self.done.append(("run", count))

    def skip(self, count):
        self.done.append(("skip", count))

    def watch(self):
        self.done.append("watch")

    def memory(self):
        return self.grown

    def close(self):
        self.done.append("close")


# -- how many fit --------------------------------------------------------------------------------


def least_bytes(model) -> int:
    """Of the tiny model's weights, in float32."""
    sizes = model.dimensions
    return (sizes.step_weights + sizes.hidden * sizes.vocab) * 4


@settings(deadline=None)
@given(each=st.integers(1, 10**6), step=st.integers(0, 10**6), most=st.integers(0, 3000))
def test_the_largest_batch_is_found_to_a_sixteenth(model, each, step, most):
    limit = least_bytes(model) + step + each * most
    tried = []

    def grown(batch):
        tried.append(batch)
        return step + each * batch

    found = largest_batch(grown, model.dimensions, 4, limit)
    assert most - max(1, found.batch // 16) < found.batch <= most
    assert len(tried) < 20
    if found.batch:
        assert found.used == least_bytes(model) + step + each * found.batch


def test_weights_that_do_not_fit_leave_no_room(model):
    def grown(batch):
        raise AssertionError("nothing should be tried")

    assert largest_batch(grown, model.dimensions, 4, least_bytes(model) - 1) == Largest(0, 0)


def test_memory_that_ends_is_an_answer_and_another_failure_is_not(model):
    def grown(batch):
        if batch > 5:
            raise PeerError("linear ended at 'run': torch.OutOfMemoryError: CUDA out of memory.")
        return batch

    assert largest_batch(grown, model.dimensions, 4, 10**12).batch == 5

    def broken(batch):
        raise PeerError("linear ended at 'open': No module named 'torch'")

    with pytest.raises(PeerError, match="No module"):
        largest_batch(broken, model.dimensions, 4, 10**12)


def test_trials_decode_the_last_line_of_their_own_batch(model, monkeypatch):
    """By what a process grows by there, it is known how many fit."""
    plan = plan_of(model.layout, steps=72, rounds=1, every=1, minutes=None, whole_images=False)
    bench = Bench(model, TINY, plan, [Contender("h2o", "policy", "h2o")], MACHINE, 12, "")
    done = []

    monkeypatch.setattr(
        bench, "session", lambda contender, watched, batch: Recording(done, 1000 * batch)
    )
    fit = bench.fit(least_bytes(model) + 2500, lambda count: None)
    assert fit.largest == {"h2o": Largest(2, least_bytes(model) + 2000)}
    trial = ["watch", "restart", ("skip", 24), ("skip", 24), ("run", 24), "close"]
    assert done == trial * 4  # of 1, 2, 4 and 3
    (grid,) = [grid for grid in grids(Summary([], {}, {}, {}), [], fit) if "batch" in grid.title]
    assert grid.rows[0][:2] == ("h2o", "2")


# -- the whole command --------------------------------------------------------------------------


@needs_compiler
def test_who_takes_part(kernel):
    policies = ["linear", "linear@skinny@compiled", "linear"]
    who = enlist(policies, ["static@compiled", "skip@skinny"], presses=True, llamagen=True)
    assert [(each.name, each.compiled, each.skinny) for each in who] == [
        ("linear", False, False),
        ("linear compiled skinny", True, True),
        ("static compiled", True, False),
        ("skip skinny", False, True),
        ("kvpress streaming_llm", False, False),
        ("kvpress lagkv", False, False),
        ("kvpress knorm", False, False),
        ("kvpress skip", False, False),
        ("llamagen official", False, False),
    ]
    assert [each.kind for each in who][:4] == ["policy", "policy", "static", "skip"]
    without = enlist(policies, ["floor"], presses=True, llamagen=False)
    assert "kvpress skip" not in [each.name for each in without]


@pytest.mark.parametrize(
    ("policies", "baselines", "error", "said"),
    [
        (["linar"], [], UnknownNameError, "linear"),
        ([], ["dinamic"], ParameterError, "dynamic"),
        ([], [], ParameterError, "nobody"),
        (["linear@compield"], [], ParameterError, "compiled"),
        ([], ["dynamic@compiled"], ParameterError, "take static@compiled"),
        (["linear@skinny"], [], ParameterError, "kvpolicy build-kernel"),
    ],
)
def test_who_can_not_take_part(policies, baselines, error, said):
    with pytest.raises(error, match=said):
        enlist(policies, baselines, presses=False, llamagen=False)


def test_steps_are_rounded_up_to_lines():
    layout = RasterLayout(rows=24, cols=24, prefix=1)
    cut = dict(rounds=1, every=1, minutes=None, whole_images=False)
    assert plan_of(layout, steps=25, **cut).lines == 2
    assert plan_of(layout, steps=None, **cut).lines == 24
    assert plan_of(layout, steps=10**6, **cut).lines == 24
    assert capacity_of("1/6", layout) == 97


@pytest.mark.slow
def test_the_command_writes_its_files(tmp_path):
    arguments = ["bench", "--layers", "1", "--batch", "1", "--steps", "48", "--rounds", "2"]
    arguments += ["--policies", "linear", "--no-memory", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rounds_finished"] == 2
    assert {figures["name"] for figures in found["figures"]} == {"linear", *BASELINES}
    assert len(found["blocks"]) == 2 * 2 * 5
    assert "1 of 12 layers" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "steps.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "abacus"], "device='abacus'"),
        (["--llamagen", "/nowhere"], "gpt.py"),
        (["--policies", "linar"], "linear"),
        (["--budget", "much"], "budget='much'"),
    ],
)
def test_wrong_arguments_fail_before_anything_runs(arguments, said, tmp_path):
    out = tmp_path / "out"
    command = ["bench", "--layers", "1", "--batch", "1", "--out", str(out), *arguments]
    result = CliRunner().invoke(app, command)
    assert said in str(result.exception)
    assert not out.exists()


# -- other processes ----------------------------------------------------------------------------


def test_memory_is_watched_after_a_whole_image_decisions_and_all(model, monkeypatch):
    """What the first decision loads (code, libraries) is not what a cache costs."""
    done = []

    plan = plan_of(model.layout, steps=96, rounds=1, every=2, minutes=None, whole_images=False)
    contender = Contender("h2o", "policy", "h2o")
    bench = Bench(model, EIGHT, plan, [contender], MACHINE, 12, "")
    monkeypatch.setattr(bench, "session", lambda contender, watched: Recording(done, 7))
    assert bench.watch_memory(lambda count: None) == {"h2o": 7}
    begun = done.index("watch")
    run, skip = ("run", 24), ("skip", 24)
    assert done[:begun] == ["restart", run, skip, skip, run]
    assert done[begun + 1 :] == ["restart", run, skip, run, run, "close"]


def in_a_process(model, **options) -> PeerSession:
    named = dict(name="linear", kind="policy", policy="linear")
    return PeerSession(
        Contender("linear", "policy", "linear"),
        OWN_WORKER,
        Path(sys.executable),
        EIGHT,
        model.dimensions,
        model.layout,
        options={"contender": {**named, **options}},
        watched=True,
    )


@pytest.mark.slow
def test_a_contender_in_another_process(model):
    run = in_a_process(model)
    try:
        run.restart()
        seconds, tokens = run.run(24)
        assert len(seconds) == 24
        assert tokens[-1] == 25
        run.skip(24 * 22)
        run.watch()
        run.restart()
        run.run(24 * 5)
        held = 97 * TOKEN * EIGHT.batch
        assert run.cache_bytes() == held
        # A step's own tensors, a few hundred kilobytes, and what the kernel rounds come on top.
        assert 0.9 * held < run.memory() < 1.5 * held
    finally:
        run.close()
    assert run.process.poll() is not None


def test_scripts_of_other_projects_code_are_where_a_model_says(model, monkeypatch):
    """They need packages that are not here: what is held is that they are found, and are told."""
    begun = {}

    class Started(PeerSession):
        def __init__(self, contender, script, python, *rest, options, watched):
            begun[contender.name] = (script, python, options)

    monkeypatch.setattr("kvpolicy.lab.bench.run.PeerSession", Started)
    who = enlist([], ["skip"], presses=True, llamagen=True)
    plan = plan_of(model.layout, steps=24, rounds=1, every=1, minutes=None, whole_images=False)
    folders = dict(environment=Path("theirs"), checkout=Path("LlamaGen"))
    bench = Bench(model, TINY, plan, who, MACHINE, 12, "", **folders)
    for contender in who[1:]:
        bench.session(contender)
    assert all(script.is_file() for script, *_ in begun.values())
    script, python, options = begun["kvpress knorm"]
    assert (script.name, python, options) == (
        "kvpress_worker.py",
        Path("theirs"),
        {"press": "knorm"},
    )
    script, python, options = begun["llamagen official"]
    assert (script.name, str(python), options) == (
        "llamagen_worker.py",
        sys.executable,
        {"checkout": "LlamaGen"},
    )


@pytest.mark.slow
def test_a_worker_that_fails_says_why(model):
    with pytest.raises(PeerError, match=r"linear ended at 'open'.*nonsense"):
        in_a_process(model, kind="nonsense")
