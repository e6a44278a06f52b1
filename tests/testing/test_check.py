"""``kvpolicy check``, and the pytest plugin: policies of other people's, held to the invariants."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

import kvpolicy
from kvpolicy.__main__ import main
from kvpolicy.testing import INVARIANTS, applicable, check_each, check_policy, policy_named

pytest.importorskip("typer", reason="the command line needs the extra 'lab'")


pytest_plugins = ["pytester"]

THEIRS = '''
import torch
from pydantic import Field
import kvpolicy


class Shares:
    """An observer of their own: mass as a share of all that a token could have got."""

    needs = kvpolicy.Need.MASS

    def __init__(self, shape):
        self.mass = torch.zeros(shape.batch, shape.heads, shape.slots)

    def observe(self, report):
        self.mass[..., : report.mass.shape[-1]] += report.mass.sum(2)

    def forget(self, slots):
        self.mass.scatter_(2, slots, 0.0)


class Mine(kvpolicy.ScoredPolicy):
    """Keep a window, and what all heads together look at."""

    window: int = Field(3, ge=0)
    weight: float = 1.0

    @property
    def mixes_heads(self):
        return True

    def observers(self, shape):
        return (Shares(shape),)

    def min_budget(self, layout):
        return self.window + 1

    def protect(self, view):
        return view.age <= self.window

    def score(self, view):
        together = view.observed(Shares).mean(1, keepdim=True)
        return self.weight * together.expand_as(view.positions)


class Broken(Mine):
    """Evicts what it protects."""

    def victims(self, view, count):
        score = self.score(view).masked_fill(view.pinned, torch.inf)
        return score.topk(count, largest=False).indices


class Raises(Mine):
    """Raises where it decides."""

    def victims(self, view, count):
        return {}["no such slot"]


class Crashes(Mine):
    """Ends the process where it decides."""

    how: str = "SIGSEGV"

    def victims(self, view, count):
        import os, signal, sys

        match self.how:
            case "leaves":
                os._exit(0)
            case "exits":
                sys.exit(0)
            case "memory":
                torch.empty(2**60)
        os.kill(os.getpid(), getattr(signal, self.how))


made = Mine(window=2)
nothing = 3
'''


@pytest.fixture
def folder(pytester):
    """The folder that we are in, with their module."""
    pytester.makepyfile(theirs=THEIRS)
    pytester.syspathinsert()
    return pytester.path


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def check(folder, monkeypatch, capfd):
    """``kvpolicy check``, which copies this process and waits."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvpolicy", "check", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as raised:
            main()
        return Done(raised.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def plugin(folder, pytester):
    """``pytest`` with the plugin, in this process."""

    def call(*arguments: str) -> Done:
        done = pytester.runpytest_inprocess("-p", "kvpolicy_pytest", "-p", "no:xdist", *arguments)
        return Done(int(done.ret), done.stdout.str(), done.stderr.str())

    return call


# -- the command -----------------------------------------------------------------------------------


def test_a_line_for_each_invariant(check):
    done = check("theirs:Mine", "--set", "window=2", "--examples", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Mine(window=2, weight=1.0)" in done.stdout
    for invariant in applicable(policy_named("h2o")):
        assert f"passed     {invariant.name} (3 streams)" in done.stdout
    assert "not asked  line locality" in done.stdout
    assert "invariants hold" in done.stdout


def test_what_is_broken_is_shown_on_the_smallest_stream(check):
    done = check("theirs:Broken", "--invariants", "pins,budget")
    assert done.returncode == 1, done.stdout + done.stderr
    for words in (
        "failed     pins",
        "passed     budget (50 streams)",
        "Broken(window=3, weight=1.0) breaks an invariant.",
        "Invariant 'pins': the prefix, anchors and sinks are never evicted",
        "On the smallest stream found: ",
        "the policy gave up [",
        "Stream: Stream(layout=",
        "INVARIANTS['pins'](Case(policy, stream))",
    ):
        assert words in done.stdout, done.stdout


def test_a_policy_that_raises_is_told_where(check):
    done = check("theirs:Raises", "--invariants", "runs")
    assert done.returncode == 1
    assert "failed     runs" in done.stdout
    assert "KeyError: 'no such slot' (raised in victims, theirs.py line" in done.stdout
    assert 'return {}["no such slot"]' in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no other process without fork")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("SIGSEGV", "it was ended by SIGSEGV: memory was read or written"),
        ("SIGABRT", "it was ended by SIGABRT"),
        ("SIGKILL", "it was ended by SIGKILL, which is what systems do when memory runs out"),
        ("leaves", "it left with exit status 0 before it was done"),
        ("exits", "it left with exit status 0 before it was done"),
    ],
)
def test_a_crash_is_an_answer_in_words(check, how, words):
    """Also where it looks like success; and where it was: on which stream, held to what."""
    done = check("theirs:Crashes", "--set", f"how={how}", "--examples", "10")
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "the process that ran theirs:Crashes did not come to its end, held to '" in said
    assert "on Stream(layout=" in said
    assert words in said
    assert "Traceback" not in done.stderr


def test_memory_that_is_not_to_be_had_breaks_an_invariant(check):
    done = check("theirs:Crashes", "--set", "how=memory", "--invariants", "runs")
    assert done.returncode == 1
    assert "RuntimeError: [enforce fail at alloc_cpu.cpp" in done.stdout


def test_a_module_that_ends_the_process_is_said_too(folder, check):
    (folder / "rude.py").write_text("import os\nos._exit(7)\n")
    done = check("rude:Policy")
    assert done.returncode == 1
    assert "while it was made: it left with exit status 7" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lineer"], "did you mean 'linear'"),
        (["theirs:Main"], "module 'theirs' has no 'Main'; did you mean 'made' or 'Mine'"),
        (["theirs:nothing"], "3 is no policy"),
        (["theirs:made", "--set", "window=1"], "has its parameters already"),
        (["absent.module:P"], "No module named 'absent'"),
        (["theirs:Mine", "--set", "window"], "'window' is not like recent_lines=2"),
        (["theirs:Mine", "--set", "window=-1"], "window=-1"),
        (["theirs:Mine", "--set", "with=1"], "no parameter 'with'"),
        (["h2o", "--invariants", "pin"], "did you mean 'pins'"),
        (["[red]evil[/red]"], "'[red]evil[/red]'"),
        (["a\nb"], r"'a\nb'"),
    ],
)
def test_wrong_arguments_are_one_line(check, arguments, words):
    done = check(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_object_and_a_composition_can_be_named(folder):
    assert policy_named("theirs:made").window == 2
    assert policy_named("theirs:Mine", ["weight=2", "window=1"]).weight == 2.0
    spelled = "streaming_llm/protect=window:3"
    assert policy_named(spelled) == kvpolicy.create(spelled)
    check_policy(policy_named("theirs:made"), examples=10)


def test_the_others_go_on_where_one_is_broken(folder):
    streams = []
    outcomes = check_each(
        policy_named("theirs:Broken"), examples=20, on_stream=lambda: streams.append(1)
    )
    assert len(streams) == 20
    broken = [outcome for outcome in outcomes if outcome.violation is not None]
    assert [outcome.invariant.name for outcome in broken] == ["pins"]
    assert broken[0].violation.shrunk
    assert all(outcome.streams == 20 for outcome in outcomes if outcome not in broken)
    assert 1 <= broken[0].streams <= 20


# -- the plugin ------------------------------------------------------------------------------------


def test_one_test_an_invariant(folder, plugin):
    (folder / "test_own.py").write_text("def test_own(): pass\n")
    few = ("--kvpolicy-examples", "5", "-v")
    done = plugin("--kvpolicy", "theirs:Mine", "--kvpolicy-set", "window=2", *few)
    assert done.returncode == 0, done.stdout
    expected = applicable(policy_named("h2o"))
    assert f"{len(expected) + 1} passed" in done.stdout
    for invariant in expected:
        assert f"theirs:Mine::{invariant.name.replace(' ', '_')} PASSED" in done.stdout
    done = plugin("--kvpolicy", "theirs:Mine", "-m", "kvpolicy", "-k", "budget", *few)
    assert "1 passed" in done.stdout


def test_a_failure_is_told_in_words(plugin):
    done = plugin("--kvpolicy", "theirs:Broken", "-k", "pins or budget")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "the policy gave up [" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_wrong_name_is_a_usage_error(plugin):
    done = plugin("--kvpolicy", "theirs:Main")
    assert done.returncode == 4, done.stdout
    assert "has no 'Main'; did you mean 'made' or 'Mine'" in done.stderr


def test_without_the_option_nothing_is_imported(folder):
    (folder / "test_own.py").write_text(
        "import sys\n"
        "def test_own(request):\n"
        "    assert request.config.pluginmanager.hasplugin('kvpolicy_pytest')\n"
        "    loaded = {'torch', 'hypothesis', 'kvpolicy', 'transformers'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
    )
    # In a process of its own: this one has imported all of it. Hypothesis has a plugin, too.
    options = ("-p", "kvpolicy_pytest", "-p", "no:hypothesispytest", "-p", "no:xdist")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_every_invariant_can_be_named():
    """Test names are invariants' names; two must not become one."""
    names = [name.replace(" ", "_") for name in INVARIANTS]
    assert len(set(names)) == len(names)
