"""Wrong uses of the command line: one line that names what is wrong, and a status of its kind.

What needs a process, a disk or a worker of its own is in ``tests/lab``; ``docs/trust.md`` lists
which test holds what.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from kvpolicy.__main__ import main

SUPPORT = Path(__file__).parents[1] / "support"
NOWHERE = "/dev/null/runs"  # nothing can be written below a device, not even by root
SUBJECT = ("--subject", "toy_subject:Toy")
TOY = (*SUBJECT, "--policies", "h2o", "--budgets", "1/2", "--executor", "inline")
ONE = (*SUBJECT, "--policy", "linear", "--budget", "1/2")
#: Statuses: what was asked for can't be; a file can't be read or written.
WRONG, FILES = 2, 74

PLANS = {
    "date.yaml": "subject: fashion-ar\npolicies: [h2o]\noptions: {mark: 2026-01-02}\n",
    "nan.json": '{"subject": "fashion-ar", "policies": ["h2o"], "options": {"mark": NaN}}',
    "half.json": r'{"subject": "fashion-ar", "policies": ["h2o"], "options": {"mark": "\ud800"}}',
    "deep.json": "[" * 100_000,
    "evil.yaml": "subject: subprocess:call\npolicies: [h2o]\n",
    "latin.yaml": b"subject: caf\xe9\n",
}

COMMANDS = [
    # folders that can't be written
    *[
        (arguments, FILES, "/dev/null", "Not a directory")
        for arguments in (
            ("ablate", *TOY, "--out", NOWHERE),
            ("tune", *ONE, "--out", NOWHERE),
            ("calibrate", *ONE, "--out", NOWHERE + "/budgets.json"),
            ("offsets", "--subject", "fashion-ar", "--out", NOWHERE + "/offsets.json"),
            ("demo", "--images", "10", "--scored", "2", "--policies", "linear", "--out", NOWHERE),
            ("report", "run", "--out", NOWHERE + "/report.html"),
            (
                "draw",
                "--model",
                "fashion-ar",
                "--classes",
                "0",
                "--policy",
                "h2o",
                "--out",
                NOWHERE,
            ),
            ("bench", "--out", NOWHERE),
        )
    ],
    (("build-kernel",), FILES, "/dev/null/runs", "Not a directory", "$KVPOLICY_KERNELS"),
    # files and folders that are not what they should be
    (("report", "nowhere"), WRONG, "nowhere", "no plan.json"),
    (("report", "date.yaml"), WRONG, "date.yaml"),
    (("ablate", *TOY, "--out", "."), WRONG, "is not empty, and holds no plan"),
    (("ablate", "--plan", "nowhere.yaml", "--out", "r"), WRONG, "nowhere.yaml can't be read"),
    (("ablate", "--plan", "latin.yaml", "--out", "r"), WRONG, "latin.yaml can't be read", "utf-8"),
    (("ablate", "--plan", "deep.json", "--out", "r"), WRONG, "deep.json is not JSON"),
    # what no file holds so that the same command is the same plan
    (("ablate", "--plan", "date.yaml", "--out", "r"), WRONG, "mark=datetime.date", "in quotes"),
    (("ablate", "--plan", "nan.json", "--out", "r"), WRONG, "mark=nan is not finite"),
    (("ablate", "--plan", "half.json", "--out", "r"), WRONG, r"mark='\ud800'", "UTF-8"),
    *[
        ((command, *given, "--option", option, "--out", "r"), WRONG, "--option", words)
        for command, given in (("ablate", TOY), ("tune", ONE), ("calibrate", ONE))
        for option, words in (
            ("mark=NaN", "mark=nan is not finite"),
            ("mark=-1e999", "mark=-inf is not finite"),
            ('mark={"a": [Infinity]}', "mark.a[0]=inf is not finite"),
            ("mark=\udcff", r"mark='\udcff' is no text that UTF-8 can hold"),
        )
    ],
    (("ablate", *TOY, "--set", "h2o.recent=NaN", "--out", "r"), WRONG, "recent=nan"),
    (("ablate", *TOY, "--option", "depth=" + "[" * 100_000, "--out", "r"), WRONG, "option 'depth'"),
    (("ablate", *TOY, "--option", "many=" + "1" * 5_000, "--out", "r"), WRONG, "option 'many'"),
    (("ablate", *TOY, "--seeds", "1" * 5_000, "--out", "r"), WRONG, "is not a whole number"),
    # what data names is not run
    (
        ("ablate", "--plan", "evil.yaml", "--out", "r", "--dry-run"),
        WRONG,
        "names 'subprocess:call'",
        "--own subprocess:call",
    ),
    (
        ("ablate", "--subject", "os:system", "--policies", "h2o", "--out", "r"),
        WRONG,
        "not a class with a method measure()",
    ),
    (("check", "[red]h2o[/]"), WRONG, "[red]h2o[/]"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of the user's with plans in it, some of them wrong, and a finished run."""
    for name, text in PLANS.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "path", [*sys.path, str(SUPPORT)])
    monkeypatch.setenv("KVPOLICY_KERNELS", NOWHERE)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_of(monkeypatch, *arguments: str) -> int | None:
    """How ``kvpolicy arguments`` would end, in this process."""
    monkeypatch.setattr(sys, "argv", ["kvpolicy", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        pytest.param(arguments, status, words, id=f"{arguments[0]}: {words[-1]}")
        for arguments, status, *words in COMMANDS
    ],
)
def test_wrong_command(here, monkeypatch, capfd, arguments, status, words):
    if "run" in arguments:
        assert status_of(monkeypatch, "ablate", *TOY, "--out", "run") == 0
        capfd.readouterr()
    assert status_of(monkeypatch, *arguments) == status
    said = " ".join(capfd.readouterr().err.split())
    for word in words:
        assert word in said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert "make room" not in said, "nobody's disk is full"
    assert not (here / "r").exists()
    assert len(said) < 2_000 + max(map(len, arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("check", "h2o", "--examples", "1", "--invariants", "budget"),
        ("ablate", *TOY, "--out", "run"),
        ("tune", *ONE, "--trials", "2", "--unseen", "1", "--out", "run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nobody_reads_the_output(here, monkeypatch, capfd, arguments):
    """``| head`` ends a command with a status of its own, not with that of a failed check."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert status_of(monkeypatch, *arguments) == 141
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "make room" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_output_is_a_full_disk(here, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert status_of(monkeypatch, "list") == FILES
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left in its buffer
    said = " ".join(capfd.readouterr().err.split())
    assert said == "error: the output can't be written: No space left on device"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("arguments", [("list",), ("ablate", *TOY, "--out", "run", "--dry-run")])
def test_a_terminal_without_our_letters(here, monkeypatch, arguments, encoding):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert status_of(monkeypatch, *arguments) == 0
    terminal.flush()
    assert b"h2o" in terminal.buffer.getvalue()
