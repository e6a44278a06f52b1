"""What lies in a folder or a file is read, never run; and every fault is one line that names it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.processes import run_command

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from kvpolicy.errors import ParameterError, RunFolderError
from kvpolicy.lab.compare.comparison_file import read_comparison
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.outputs import write_outputs
from kvpolicy.lab.run.plan import Plan, read_plan
from kvpolicy.lab.run.run_folder import CellRecord, open_run
from kvpolicy.lab.run.runner import prepare, run, writing
from kvpolicy.lab.run.subject import _COLUMNS, load_subject
from kvpolicy.lab.show.report import report_on_run
from kvpolicy.lab.show.tables import COLUMNS

HERE = Path(__file__).parents[1] / "support"
TOY = ("--subject", "toy_subject:Toy", "--policies", "h2o", "--budgets", "1/2")


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def searched(path: Path) -> str:
    """A PYTHONPATH that begins with a path. No entry is empty: that would be the current folder."""
    return os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))


def command(*arguments: str, cwd: Path):
    """A command of a user who has no subject of theirs where Python looks, in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "kvpolicy", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": searched(cwd / "nowhere"), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def said(done) -> str:
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the toy subject that has come to its end."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    sys.path.insert(0, str(HERE))
    wanted = Plan(
        subject="toy_subject:Toy", policies=["linear", "h2o"], budgets=["1/2", "1/4"], seeds=[0, 1]
    )
    prepared = prepare(wanted)
    entries, _ = write_outputs(run(prepared, folder, Inline()), prepared.metrics)
    sys.path.remove(str(HERE))
    return folder, entries


def copy_of(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", folder, to], check=True)
    return to


# --- Nothing that data names is imported ------------------------------------------------------


def test_a_report_imports_nothing_that_the_folder_names(finished, tmp_path):
    """Neither a module that the plan calls a subject, nor a file called as a package of ours."""
    folder = copy_of(finished[0], tmp_path / "run")
    plan = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(plan.replace("toy_subject:Toy", "evil:Toy"))
    for cell in folder.glob("cells/*"):
        text = (cell / "cell.json").read_text().replace("toy_subject:Toy", "evil:Toy")
        (cell / "cell.json").write_text(text)
    for name in ("evil", "plotly", "jinja2", "toy_subject"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    by_content = {cell.model_dump_json(): cell.id for cell in open_run(folder).plan.cells()}
    for old in list(folder.glob("cells/*")):
        record = CellRecord.model_validate_json((old / "cell.json").read_bytes())
        name = by_content[record.cell.model_dump_json()]
        (old / "cell.json").write_text(record.model_copy(update={"id": name}).text())
        old.rename(old.with_name(name))
    done = command("report", "run", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert (folder / "report.html").stat().st_size > 10**6
    assert not (tmp_path / "ran").exists()


def test_a_finished_run_has_every_interval_in_its_report_and_an_unfinished_one_says_which_not(
    finished, tmp_path
):
    """The spread is no mean: only the subject can resample it, and did."""
    folder, entries = finished
    low = entries[1].findings["spread"].estimate.low
    report_on_run(open_run(folder), tmp_path / "whole.html")
    whole = (tmp_path / "whole.html").read_text(encoding="utf-8")
    assert f"{low:.4g} …" in whole
    assert "has not come to its end" not in whole

    part = copy_of(folder, tmp_path / "part")
    for cell in list(part.glob("cells/h2o*"))[:1]:
        subprocess.run(["rm", "-r", cell], check=True)
    report_on_run(open_run(part), tmp_path / "part.html")
    text = (tmp_path / "part.html").read_text(encoding="utf-8")
    assert "has not come to its end" in text
    assert f"{low:.4g} …" not in text
    seeds = [cell.record.metrics["spread"] for cell in entries[1].cells]
    assert f"<b>{sum(seeds) / len(seeds):.4g}</b>" in text
    bits = entries[1].findings["bits"].estimate
    assert f"{bits.low:.4g} … {bits.high:.4g}" in text  # a mean has its interval all the same


def test_a_comparison_of_other_cells_is_not_read(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path / "run")
    cells = list(open_run(folder).finished())
    read = read_comparison(folder, cells)
    assert [entry.findings for entry in read] == [entry.findings for entry in finished[1]]
    assert read_comparison(folder, cells[1:]) is None
    other = cells[1].record.model_copy(update={"seconds": 0.5})  # as if measured anew
    (cells[1].folder / "cell.json").write_text(other.text())
    assert read_comparison(folder, list(open_run(folder).finished())) is None
    (folder / "comparison.json").write_text("[{}]")
    assert read_comparison(folder, cells) is None


@pytest.mark.parametrize("place", ["subject", "policies"])
def test_a_plan_file_imports_only_what_is_named_on_the_command_line_too(tmp_path, place):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    fields = {"subject": "toy_subject:Toy", "policies": "[h2o]"} | {
        place: {"subject": "evil:Toy", "policies": "[evil:P]"}[place]
    }
    text = "\n".join(f"{name}: {value}" for name, value in fields.items())
    (tmp_path / "plan.yaml").write_text(text)
    own = ("--own", "toy_subject:Toy")
    asked = ("ablate", "--plan", "plan.yaml", "--dry-run", "--out", "r", *own)
    ran = run_command(*asked, folder=tmp_path)
    assert ran.returncode == 2
    assert "plan plan.yaml names 'evil:" in said(ran)
    assert "--own evil:" in said(ran)
    assert not (tmp_path / "ran").exists()


def test_what_is_named_too_is_used(tmp_path):
    (tmp_path / "plan.json").write_text('{"subject": "toy_subject:Toy", "policies": ["h2o"]}')
    with pytest.raises(ParameterError, match="--own toy_subject:Toy"):
        read_plan(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", ["toy_subject:Toy"]).subject == "toy_subject:Toy"


@pytest.mark.parametrize("name", ["subprocess:call", "subprocess:Popen", "os:system"])
def test_only_a_class_of_subjects_is_called(tmp_path, name):
    options = {"args": ["touch", str(tmp_path / "ran")], "command": f"touch {tmp_path / 'ran'}"}
    with pytest.raises(ParameterError, match="not a class with a method measure"):
        load_subject(name, options)
    assert not (tmp_path / "ran").exists()


def test_the_users_folder_comes_last_and_only_where_a_module_of_theirs_is_asked_for(tmp_path):
    for name in ("plotly", "rich", "matplotlib", "filelock"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "theirs.py").write_text((HERE / "toy_subject.py").read_text())
    toy = ("--subject", "theirs:Toy", *TOY[2:])
    done = command("ablate", *toy, "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    done = command("report", "r", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert not (tmp_path / "ran").exists()


# --- Boundaries: one error in words, what had finished is there -------------------------------


def test_room_is_asked_for_where_a_disk_is_full():
    for number, word in ((28, "make room"), (13, "see to that")):
        with pytest.raises(RunFolderError, match=word), writing(Path("r")):
            raise OSError(number, os.strerror(number))


def test_a_date_in_yaml_is_refused_by_name(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "subject: toy_subject:Toy\npolicies: [h2o]\noptions: {mark: 2026-01-02}\n"
    )
    with pytest.raises(ParameterError, match=r"mark=datetime.date.*of type date.*in quotes"):
        read_plan(tmp_path / "plan.yaml", ["toy_subject:Toy"])
    (tmp_path / "plan.yaml").write_text("2026-01-02: toy\n")
    with pytest.raises(ParameterError, match="must be a mapping"):
        read_plan(tmp_path / "plan.yaml")


def test_a_reader_that_goes_away_is_no_full_disk(tmp_path):
    seeds = ",".join(map(str, range(30)))
    line = f"{sys.executable} -m kvpolicy ablate {' '.join(TOY[:-1])} {TOY[-1]}"
    done = subprocess.run(
        ["bash", "-c", f"{line} --seeds {seeds} --executor inline --out r | head -n 1; "
         "exit ${PIPESTATUS[0]}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": searched(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 141, said(done)
    assert "as nobody reads the output" in said(done)
    assert "make room" not in said(done)
    assert "Traceback" not in said(done)
    assert len(list(open_run(tmp_path / "r").finished())) >= 1
    assert not open_run(tmp_path / "r").damaged()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_letters_ends_nothing(tmp_path, encoding):
    pytest.importorskip("optuna", reason="tune needs optuna")
    done = run_command(
        *("tune", "--subject", "toy_subject:Toy", "--policy", "linear", "--budget", "1/2"),
        *("--trials", "2", "--unseen", "1", "--out", "r"),
        folder=tmp_path,
        encoding=encoding,
    )
    assert done.returncode == 0, said(done)
    assert (tmp_path / "r" / "best.json").exists()
    assert "wrote" in done.stdout


def test_what_a_subject_prints_is_not_among_the_lines(tmp_path):
    text = (HERE / "toy_subject.py").read_text()
    text = text.replace("import os\n", "import os\nprint('imported')\n", 1)
    text = text.replace(
        "        key = setting.policy.key\n",
        "        key = setting.policy.key; print('hello'); os.system('echo from below')\n",
    )
    (tmp_path / "loud.py").write_text(text)
    loud = ("--subject", "loud:Toy", *TOY[2:])
    for executor in ("inline", "processes"):
        asked = ("ablate", *loud, "--out", executor, "--executor", executor)
        done = run_command(*asked, folder=tmp_path)
        assert done.returncode == 0, said(done)
        lines = done.stdout.splitlines()
        if executor == "inline":  # what is not Python's can be turned aside in a worker only
            lines = [line for line in lines if line != "from below"]
        assert [json.loads(line)["event"] for line in lines] == ["begun", "done", "done"]
        assert "hello" in said(done)
        assert "imported" in said(done)


def test_metrics_with_odd_labels_are_drawn_and_those_that_share_a_column_refused(
    tmp_path, monkeypatch
):
    import toy_subject

    from kvpolicy.lab.run.subject import Metric

    assert set(COLUMNS) < _COLUMNS

    class Odd(toy_subject.Toy):
        label, metric = r"cost in $\frac{$ & <b>", "bits"

        def __init__(self):
            super().__init__()
            bits = Metric(name=self.metric, label=self.label, array="bits", items="item")
            self.metrics = (bits, *self.metrics[1:])

    monkeypatch.setattr(toy_subject, "Odd", Odd, raising=False)
    wanted = Plan(subject="toy_subject:Odd", policies=["h2o"], budgets=["1/2"])
    prepared = prepare(wanted)
    write_outputs(run(prepared, tmp_path / "odd", Inline()), prepared.metrics)
    report_on_run(open_run(tmp_path / "odd"), tmp_path / "odd.html")
    for taken in ("seed", "peak_tokens", "spread_low", "budget_tokens", "seeds"):
        Odd.metric = taken
        with pytest.raises(ParameterError, match=f"metric '{taken}' is also the name of a column"):
            load_subject("toy_subject:Odd")


def test_ctrl_c_ends_also_while_a_worker_is_stopped(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpolicy", "ablate", *TOY, "--out", "r", "--workers", "1",
         "--option", "seconds=60", "--option", f"diary={tmp_path / 'diary'}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": searched(HERE)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        # A shell lets what it starts in the background ignore Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "diary").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        worker = int((tmp_path / "diary").read_text().split()[1])
        os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not psutil.pid_exists(worker)
    finally:
        process.kill()
        process.stderr.close()


# --- Large runs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report_of_hundreds_of_cells_stays_small(tmp_path, monkeypatch):
    """No clock here: the page's size, and that nothing goes missing without a word."""
    import toy_subject

    class Drawing(toy_subject.Toy):
        """Draws ten noisy images, which no PNG makes smaller."""

        def measure(self, setting, seed, wanted):
            images = np.random.default_rng(seed).integers(0, 255, (10, 28, 28), np.uint8)
            return replace(super().measure(setting, seed, wanted), images=images)

    monkeypatch.setattr(toy_subject, "Drawing", Drawing, raising=False)
    wanted = Plan(
        subject="toy_subject:Drawing",
        policies=[{"name": "random", "parameters": {"seed": list(range(40))}}],
        budgets=[f"{n}/21" for n in range(10, 20)],
    )
    prepared = prepare(wanted)
    folder = run(prepared, tmp_path / "large", Inline())
    assert len(list(folder.finished())) == 401
    report_on_run(folder, tmp_path / "large.html")
    text = (tmp_path / "large.html").read_text(encoding="utf-8")
    pictures = sum(map(len, re.findall(r"data:image/png;base64,[\w+/=]+", text)))
    assert 10**5 < pictures < 1.5 * 10**6  # all of them are four times as much
    assert text.count("<tr>") > 401
    assert "rows of drawn images are left out" in text
