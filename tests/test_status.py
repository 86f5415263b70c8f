"""The ten-second answer and what goes with it: status, report, preflight and clean, on real runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2core import attempts, lock
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.cli import run
from gpt2core.config import RunConfig
from gpt2core.log_history import starts
from gpt2core.preflight import preflight
from gpt2core.run_folder import RunFolder
from gpt2core.status import find_runs, status_of
from tasks.stage_process import StageError

pytestmark = pytest.mark.slow  # each starts trainers or looks at what they left


@pytest.fixture
def tiny(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return lab.copy_run(straight, tmp_path)


def gpt2(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def config_of(run: Path) -> RunConfig:
    config = RunConfig.model_validate_json((run / "config.json").read_text())
    return config.model_copy(update={"artifacts_dir": str(run.parent)})


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_of_a_run_from_its_start_over_a_kill_to_its_end(
    lab: Any, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    folder = RunFolder(tmp_path, "tiny")
    with lab.started(folder.path, [*lab.flags(tmp_path), "--resume", "latest"]) as trainer:
        trainer.wait_for_step(6)
        seen = status_of(folder)
        assert seen.state == "training" and f"process {trainer.process.pid} on" in (seen.alive or "")
        assert seen.max_steps == lab.max_steps and seen.step and seen.step >= 6 and seen.epoch == 1
        assert seen.eta_s and seen.eta_s > 0 and seen.done_at and seen.beat_s_ago is not None
        os.kill(trainer.process.pid, signal.SIGKILL)
        trainer.wait()
    stopped = status_of(folder)
    assert (stopped.state, stopped.alive, stopped.done_at) == ("stopped", None, None)
    assert stopped.died_of == attempts.CUT_OFF
    assert stopped.saved_step is not None and stopped.step is not None and stopped.saved_step <= stopped.step
    train_here([*lab.flags(tmp_path), "--resume", "latest"])
    where_no_terminal_is = capsys.readouterr().out
    assert "\x1b" not in where_no_terminal_is and f"step={lab.max_steps} loss=" in where_no_terminal_is
    done = status_of(folder)
    assert done.resumes == 1 and done.last_resume and done.died_of is None
    assert (done.last_resume.step, done.last_resume.why) == (stopped.saved_step, attempts.CUT_OFF)
    assert done.steps_lost == stopped.step - stopped.saved_step
    assert (done.state, done.step, done.epoch) == ("done", lab.max_steps, 2)
    assert [(stage.stage, stage.done) for stage in done.stages] == [
        ("prepare", True),
        ("train", True),
        ("evaluate", False),
        ("promote", False),
    ]
    assert done.best_val_loss == min(loss for step, loss in lab.logged(folder.path, "val_loss").items() if step)


def test_status_tells_what_the_last_attempt_died_of_and_what_was_warned(tiny: Path, capsys: Any) -> None:
    folder = RunFolder(tiny.parent, "tiny")
    for why in ("rank 1 was killed by SIGKILL", "the GPU fell off the bus"):
        attempts.begin(folder, "flow")
        attempts.end(folder, "failed", why)
    with folder.log_file.open("a") as log:
        log.write("2026-11-23 08:00:00 WARNING: the disk is slow\n")
    (tiny / "metrics.jsonl").write_text('{"step": 7, "loss": 9.5, "max_steps": 24, "eta_s": 100.0}\n')
    assert gpt2("status", "--artifacts_dir", tiny.parent) in (None, 0)
    shown = capsys.readouterr().out
    assert "not running; the last attempt: the GPU fell off the bus" in shown
    assert "resumed 1 time, 0 steps lost in all" in shown and "rank 1 was killed by SIGKILL" in shown
    assert "1 warnings in log.txt" in shown and "the disk is slow" in shown
    assert not gpt2("status", "--artifacts_dir", tiny.parent, "--json")
    (told,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (told["state"], told["step"], told["died_of"]) == ("stopped", 7, "the GPU fell off the bus")
    assert (told["num_warnings"], told["resumes"], told["epoch"]) == (1, 1, 1)


@pytest.mark.parametrize("width", [80, 160])
def test_status_fits_the_terminal(tiny: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tiny.rename(tiny.parent / "a_run_with_a_long_name_of_its_own")
    (metrics,) = tiny.parent.glob("*/metrics.jsonl")
    with metrics.open("a") as lines:
        lines.write('{"step": 81234, "loss": 9.5, "max_steps": 95365, "eta_s": 187200.0, "tokens_per_sec": 401234}\n')
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: this is a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    assert not gpt2("status", "--artifacts_dir", tiny.parent)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    (row,) = [line for line in shown.splitlines() if "stopped" in line and "81234" in line]
    assert len(row) <= width and "2d04h" in row and "…" not in shown
    assert ("81234 of 95365" in row) == (width == 80) and ("401,234" in row) == (width == 160)
    assert ("train loss 9.5000, tokens/s 401,234, saved 24" in shown) == (width == 80)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("promotion.json", b"{"),
        ("metrics.jsonl", b'{"step": 1}\n\xff\xfe\n'),
        ("metrics.jsonl", b"5\n"),
        ("metrics.jsonl", b"{}\n"),
        ("config.json", b"\xff"),
    ],
)
def test_a_damaged_file_takes_only_its_run_away(tiny: Path, lab: Any, name: str, content: bytes, capsys: Any) -> None:
    other = lab.copy_run(tiny, tiny.parent, "other")
    (other / name).write_bytes(content)
    assert not gpt2("status", "--artifacts_dir", tiny.parent)
    shown = capsys.readouterr().out
    assert re.search(rf"^other: unreadable: .*{other / name}\b", shown, re.MULTILINE), shown
    assert "tiny: done  train" in shown
    assert not gpt2("report", "--artifacts_dir", tiny.parent)
    page = (tiny.parent / "report.html").read_text()
    assert f"{other / name}" in page and page.count("<svg") == 5 and page.count("<table>") == 1


def test_damage_that_is_no_runs_is_told_beside_the_runs(tiny: Path, capsys: Any) -> None:
    (tiny / "heartbeat.json").write_bytes(b"\xff")
    (tiny.parent / "best").mkdir()
    (tiny.parent / "best" / "promotion.json").write_bytes(b"\xff")
    assert not gpt2("status", "--artifacts_dir", tiny.parent)
    shown = capsys.readouterr().out
    assert "tiny: done  train" in shown
    assert f"promoted: unreadable: {tiny.parent / 'best' / 'promotion.json'} is no promotion record" in shown


def test_a_trainer_that_gives_up_leaves_its_error_in_the_log(
    lab: Any, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    said = r"updates in a row had gradients that are not finite"
    with pytest.raises(FloatingPointError, match=said):
        train_here(lab.flags(tmp_path, max_lr=1e30))
    capsys.readouterr()
    assert not gpt2("status", "--artifacts_dir", tmp_path)
    shown = capsys.readouterr().out
    assert re.search(rf"not running; the last attempt: step \d+: \d+ {said}", shown), shown
    assert re.search(rf"WARNING: training ended: step \d+: \d+ {said}", shown)
    assert not gpt2("status", "--artifacts_dir", tmp_path, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told["loss"] is None and told["step"]


def test_a_silent_trainer_has_no_end_in_sight_and_a_crash_between_stages_its_cause(tiny: Path, capsys: Any) -> None:
    folder = RunFolder(tiny.parent, "tiny")
    folder.metrics_file.write_text('{"step": 7, "loss": 9.5, "max_steps": 24, "eta_s": 100.0}\n')
    with lock.hold(tiny / lock.LOCK_FILE):
        os.utime(folder.heartbeat_file)
        assert status_of(folder).done_at
        os.utime(folder.heartbeat_file, (0, 0))
        silent = status_of(folder)
        assert (silent.state, silent.done_at) == ("silent", None)
    attempts.begin(folder, "flow")
    attempts.end(folder, "failed", "the GPU fell off the bus")
    with lock.hold(tiny / lock.FLOW_LOCK_FILE):
        assert not gpt2("status", "--artifacts_dir", tiny.parent)
    assert re.search(
        r"tiny: between stages, by .*; the last attempt: the GPU fell off the bus$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_a_run_is_done_at_the_end_of_its_flow_though_that_holds_its_lock(tiny: Path) -> None:
    folder = RunFolder(tiny.parent, "tiny")
    with lock.hold(tiny / lock.FLOW_LOCK_FILE):
        assert status_of(folder).state == "between stages"
        ended = status_of(folder, is_end_of_flow=True)
    assert (ended.state, ended.alive) == ("done", None)


def test_the_cause_of_a_resume_is_no_step_line() -> None:
    step = "2026-11-23 08:44:19 step=577 loss=8.5141 lr=0.00055"
    killed = "python -m gpt2core.train was killed by SIGKILL"
    assert StageError(f"{killed}:\n{step}").sentence == killed
    assert StageError(f"{killed}:\nthe bus is gone\n{step}").sentence == f"{killed}: the bus is gone"


# --- report ----------------------------------------------------------------------------------------------------------


def test_report_compares_runs_in_one_file(tiny: Path, lab: Any, tmp_path: Path, capsys: Any) -> None:
    lab.copy_run(tiny, tiny.parent, "other")
    target = tmp_path / "report.html"
    assert not gpt2("report", "--artifacts_dir", tiny.parent, "--to", target)
    page = target.read_text()
    assert page.count("<svg") == 5 and "<h2>tiny</h2>" in page and "<h2>other</h2>" in page
    assert not re.search(r"<(img|script|link)|src=|href=\"http", page), "it needs nothing beside it"
    assert f"<td>{lab.logged(tiny, 'loss')[24]:.4f}</td>" in page  # of the last epoch
    with pytest.raises(ValueError, match="holds no run nothing; there are: other, tiny"):
        gpt2("report", "--artifacts_dir", tiny.parent, "--run_name", "nothing")


# --- preflight -------------------------------------------------------------------------------------------------------


def test_preflight_prints_every_finding(lab: Any, tmp_path: Path, capsys: Any) -> None:
    assert gpt2("preflight", *lab.flags(tmp_path)) == 0
    shown = capsys.readouterr().out
    for what in ("GPUs", "ports", "packages", "batch", "model", "data", "folders", "disk", "clock"):
        assert re.search(rf"^ok +{what} ", shown, re.MULTILINE), shown
    assert "7 files of" in shown and shown.endswith("ready\n")
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
    in_the_way = tmp_path / "a_file"
    in_the_way.touch()
    assert gpt2("preflight", *lab.flags(in_the_way, data_dir=tmp_path / "none")) == 1
    shown = capsys.readouterr().out
    assert re.search(rf"^error +data .*{tmp_path}/none.*gpt2 prepare", shown, re.MULTILINE)
    assert re.search(rf"^error +folders .*because of {in_the_way}", shown, re.MULTILINE)
    assert re.search(r"^\d to put right before the run can start$", shown, re.MULTILINE)


def test_a_resume_needs_only_room_for_what_it_still_writes(tiny: Path, small_disk_bytes: Any) -> None:
    """A run that is done, or has all its files, is not refused on a full disk as one that begins is."""
    config = config_of(tiny)
    one = CheckpointFolder(str(tiny / "checkpoints")).find("latest")
    assert one
    small_disk_bytes(2 * one.sidecar.bytes)
    preflight(config, 1)  # nothing is left to write
    longer = config.model_copy(update={"train": config.train.model_copy(update={"num_epochs": 40})})
    (told,) = [line for line in preflight(longer, 1) if "disk" in line]
    assert told.startswith("WARNING: disk: ") and "free some space or lower --keep_checkpoints" in told
    fresh = longer.model_copy(update={"run_name": "fresh"})
    with pytest.raises(ValueError, match="free some space or lower --keep_checkpoints"):
        preflight(fresh, 1)
    small_disk_bytes(one.sidecar.bytes // 2)
    with pytest.raises(ValueError, match="free some space or lower --keep_checkpoints"):
        preflight(longer, 1)


@pytest.fixture
def small_disk_bytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the operating system's answer to how much is free be this number: a disk of that size needs root."""

    def free(count: int) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=count))

    return free


# --- clean -----------------------------------------------------------------------------------------------------------


def test_clean_says_what_would_go_and_removes_it_when_told(tiny: Path, capsys: Any) -> None:
    arguments = ["clean", "--artifacts_dir", tiny.parent, "--run_name", "tiny"]
    assert not gpt2(*arguments)
    assert re.search(r"would remove .*/tiny: \d+ files, .* MB\nnothing was removed", capsys.readouterr().out)
    assert (tiny / "checkpoints" / "latest.pt").exists()
    assert not gpt2(*arguments, "--yes")
    assert "removed " in capsys.readouterr().out and not tiny.exists()
    for name in ("tiny", ".."):
        with pytest.raises(ValueError, match="holds no run"):
            gpt2("clean", "--artifacts_dir", tiny.parent, "--run_name", name, "--yes")


def test_clean_spares_a_run_that_is_alive_and_the_one_that_was_promoted(tiny: Path, lab: Any) -> None:
    arguments = ["clean", "--artifacts_dir", tiny.parent, "--run_name", "tiny", "--yes"]
    for name in (lock.LOCK_FILE, lock.FLOW_LOCK_FILE):
        with lock.hold(tiny / name), pytest.raises(ValueError, match=rf"is alive: .*process {os.getpid()}"):
            gpt2(*arguments)
    evaluation = ["--checkpoint", "best", "--hellaswag", lab.examples(1), "--device", "cpu"]
    assert not gpt2("evaluate", *arguments[1:5], *evaluation)
    assert not gpt2("promote", *arguments[1:5])
    with pytest.raises(ValueError, match=r"the run that .*/best came from \(step \d+\): promote another first"):
        gpt2(*arguments)
    assert (tiny / "config.json").exists()
    assert [run.path.name for run in find_runs(tiny.parent)] == ["tiny"]  # best/ is none


# --- tensorboard and the terminal ------------------------------------------------------------------------------------


def test_tensorboard_on_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port}: cannot listen on 127.0.0.1:{port} \(.*in use\); give"):
            gpt2("tensorboard", "--artifacts_dir", tmp_path, "--port", port)


def test_training_on_a_terminal_draws_a_bar(lab: Any, tmp_path: Path) -> None:
    import pty

    flags = lab.flags(tmp_path, num_epochs=1, steps_per_epoch=4, eval_freq=2)
    command = lab.command("gpt2core.cli", ["train", *flags])
    environment = {name: value for name, value in lab.environment().items() if name != "CI"} | {"TERM": "xterm"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # EIO: the last of those that had the terminal has ended
        pass
    finally:
        os.close(ours)
    text = shown.decode()
    assert process.wait(lab.deadline_s) == 0, text
    assert re.search(r"training.*100%.*step 4 of 4, loss \d+\.\d+, [\d,]+ tokens/s, 0s left", text)
    assert "step=4 val_loss=" in text and "step=4 loss=" not in text  # the one stays to be read, the other is the bar
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"
    log = (tmp_path / "tiny" / "logs" / "log.txt").read_text()
    assert re.search(r"^\S+ \S+ step=4 loss=\S+ lr=\S+ .* of=4 eta=0s$", log, re.MULTILINE) and "\x1b" not in log


def test_the_lines_of_long_work_become_bars_and_end() -> None:
    """What `gpt2 prepare` and evaluations say, as a launcher gets it."""
    code = (
        "import sys; from gpt2core import terminal; sys.stdout.isatty = lambda: True; terminal.tell('begun')\n"
        "for line in sys.stdin: terminal.tell(line.strip())\n"
    )
    lines = ["tokenized 12.5%: 1,000 tokens, 500 tokens/s, 0:00:07 left", "HellaSwag, batches: 3 of 12", "done [x]"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {
        "FORCE_COLOR": "1",
        "TERM": "xterm",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"tokenizing.*12%.*1,000 tokens, 500 tokens/s, 0:00:07 left", done.stdout)
    assert re.search(r"HellaSwag, batches.*25%.*3 of 12", done.stdout)
    assert "done [x]" in done.stdout


def test_a_start_that_another_rank_was_told_to_end_is_known_as_stopped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.log_file.parent.mkdir(parents=True)
    folder.log_file.write_text(
        "2026-11-27 10:00:00 starting afresh, 10 steps to do\n"
        "2026-11-27 10:00:01 step=5 loss=9.1\n"
        "2026-11-27 10:00:02 a signal to another rank: saved at step 5; go on with --resume latest\n"
        "2026-11-27 10:00:02 at step 5 of 10\n"
    )
    (only,) = starts(folder)
    assert only.has_ended and only.error == "it was told to stop (a signal to another rank)"
