"""Checkpoints on S3: the same guarantees as in a local folder, and bytes that are sent once."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import DEADLINE_S, S3, Fault
from test_commit import check, state

from gpt2core.checkpoint import load_newest, save
from gpt2core.checkpoint_folder import FORMAT, CheckpointFolder
from gpt2core.cli import run as gpt2
from gpt2core.flags import TRY_AGAIN

pytestmark = pytest.mark.slow  # trainers and a server


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trainers put temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    return scratch


@pytest.fixture
def remote_run(lab: Any, straight: Path, s3: S3, tmp_path: Path) -> Path:
    """The straight run, as if it had had its checkpoints at s3://BUCKET/checkpoints/tiny from the start."""
    run = tmp_path / "artifacts" / "tiny"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((run / "config.json").read_text())
    config["train"]["checkpoint_dir"] = f"{s3.bucket_url}/checkpoints"
    (run / "config.json").write_text(json.dumps(config))
    for path in (straight / "checkpoints").iterdir():
        s3.add(f"checkpoints/tiny/{path.name}", path.read_bytes())
    return run


def test_a_run_killed_in_an_upload_goes_on_to_the_same_end(
    lab: Any, straight: Path, s3: S3, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    run = tmp_path / "tiny"
    flags = lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints")
    held = s3.hold("PUT", "rolling_step_000008.pt")
    with lab.started(run, flags) as trainer:
        trainer.wait_for(held.reached.is_set, "the upload of step 8")
        os.kill(trainer.process.pid, signal.SIGKILL)
        trainer.wait()
    held.release(drop=True)
    train_here([*flags, "--resume", "latest"])
    assert f"resumed from {s3.bucket_url}/checkpoints/tiny at step 6 of 24" in capsys.readouterr().out
    lab.assert_same_run(run, straight)
    assert not (run / "checkpoints").exists()
    names = {path.stem for path in (straight / "checkpoints").glob("*.pt")}
    assert {name.removesuffix(".pt") for name in s3.contents("checkpoints/tiny") if name.endswith(".pt")} == names
    sent = {
        request.path.rpartition("/")[2]: request.length for request in s3.faults.requests if request.method == "PUT"
    }
    assert sent["rolling_step_000024.pt"] > 1_000_000
    for name in ("latest", "latest_backup", "best_model", "epoch_00001", "epoch_00002"):
        assert sent[f"{name}.pt"] == 0, "a copy on the server"


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_a_commit_that_ends_at_any_request_leaves_a_whole_newest_or_previous_state(s3: S3, every: int) -> None:
    """From its Nth request on the server refuses all: to the storage that is what a kill there would be."""
    for step in (1, 2, 3):
        names = ["epoch_00001", "best_model"] if step == 2 else []
        save(CheckpointFolder(f"{s3.bucket_url}/start"), state(step, float(step)), names=names, keep=10)
    start = s3.contents("start")
    seen = []
    for requests in itertools.count(step=every):
        folder = CheckpointFolder(f"{s3.bucket_url}/ended_after_{requests}")
        for name, content in start.items():
            s3.add(f"ended_after_{requests}/{name}", content)
        refusal = s3.faults.add(Fault(None, "", "403", after=requests, times=1 << 30))
        try:
            save(folder, state(4, 4.0), names=["epoch_00002", "best_model"], keep=2)
        except ValueError:
            ended_early = True
        else:
            ended_early = False
        refusal.after = refusal.times = 0
        seen.append(check(folder, {(3, 3.0), (4, 4.0)}))
        if not ended_early:
            break
    assert len(seen) > 20 // every and set(seen) == {(3, 3.0), (4, 4.0)}


SAVE_LARGE = """
import sys, torch
from gpt2core.checkpoint import save
from gpt2core.checkpoint_folder import CheckpointFolder
model = {"w": torch.full((30_000_000,), 2.0)}  # 120 MB: s3fs sends what is above 100 MB in parts
state = dict(format=1, step=2, epoch=0, train_loss=None, val_loss=None, model=model)
save(CheckpointFolder(sys.argv[1]), state, names=[], keep=5)
"""


def test_an_upload_in_parts_that_is_killed_leaves_nothing_to_be_seen(s3: S3, scratch: Path) -> None:
    folder = CheckpointFolder(f"{s3.bucket_url}/run")
    first = {"format": FORMAT, "step": 1, "epoch": 0, "model": {"w": torch.ones(10)}}
    save(folder, first, names=[], keep=5)
    held = s3.hold("PUT", "rolling_step_000002.pt", after=1)  # the second part
    command = [sys.executable, "-c", SAVE_LARGE, folder.location]
    with subprocess.Popen(command, env=os.environ | s3.environment) as process:
        assert held.reached.wait(DEADLINE_S)
        process.kill()
    held.release(drop=True)
    assert folder.names() == ["latest", "rolling_step_000001"]
    subprocess.run(command, env=os.environ | s3.environment, check=True, timeout=DEADLINE_S)
    newest = load_newest(folder, lambda warning: pytest.fail(warning))
    assert newest and newest["step"] == 2 and newest["model"]["w"].shape == (30_000_000,)
    assert list(scratch.rglob("*")) == []


def test_a_killed_upload_leaves_no_local_file_for_good(lab: Any, s3: S3, tmp_path: Path, scratch: Path) -> None:
    flags = lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints", num_epochs=1)
    held = s3.hold("PUT", "rolling_step_000002.pt")
    with lab.started(tmp_path / "tiny", flags) as trainer:
        trainer.wait_for(held.reached.is_set, "the upload of step 2")
        os.kill(trainer.process.pid, signal.SIGKILL)
        trainer.wait()
    held.release(drop=True)
    assert [path.stat().st_size for path in scratch.rglob("*") if path.is_file()] != []
    lab.train([*flags, "--resume", "latest"])
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def step_of_latest(folder: CheckpointFolder) -> int:
    found = folder.find("latest")  # not there for the moment in which it moves
    return found.sidecar.step if found else 0


def test_training_goes_on_while_the_storage_is_away(lab: Any, s3: S3, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    endless = {"steps_per_epoch": 100_000, "eval_freq": 0, "checkpoint_freq": 10}
    flags = lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints", **endless)
    folder = CheckpointFolder(f"{s3.bucket_url}/checkpoints/tiny")
    with lab.started(run, flags) as trainer:
        trainer.wait_for(lambda: folder.find("latest"), "the first checkpoint")
        away = s3.fail("PUT", ".pt", times=1 << 30)
        trainer.wait_for(lambda: "checkpoint not written" in trainer.output, "the warning")
        trainer.wait_for_step(max(lab.logged(run, "loss")) + 1)
        whole = load_newest(folder, lambda warning: pytest.fail(warning))
        away.times = 0  # it is back
        trainer.wait_for(lambda: step_of_latest(folder) > whole["step"], "a newer checkpoint")
        os.kill(trainer.process.pid, signal.SIGTERM)
        assert trainer.wait() == 0, trainer.output
    assert load_newest(folder, lambda warning: pytest.fail(warning))["step"] == max(lab.logged(run, "loss"))


@pytest.mark.parametrize(("module", "command"), [("gpt2core.train", []), ("gpt2core.cli", ["train"])])
def test_a_second_ctrl_c_ends_a_run_whose_last_upload_hangs(
    lab: Any, s3: S3, tmp_path: Path, module: str, command: list[str]
) -> None:
    run = tmp_path / "tiny"
    endless = {"steps_per_epoch": 100_000, "eval_freq": 0, "checkpoint_freq": 0}
    flags = lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints", **endless)
    held = s3.hold("PUT", ".pt")
    with lab.started(run, [*command, *flags], module=module) as started:
        started.wait_for_step(2)
        trainers = started.children() if command else [started.process.pid]
        os.kill(started.process.pid, signal.SIGINT)
        started.wait_for(held.reached.is_set, "the upload")
        os.kill(started.process.pid, signal.SIGINT)
        assert started.wait() == 128 + signal.SIGINT, started.output
        lab.wait_until(lambda: not any(map(lab.is_alive, trainers)), "the trainer to end")
    held.release(drop=True)


def test_storage_that_does_not_answer_is_refused_at_the_start_in_one_sentence(
    lab: Any, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    done = lab.run("gpt2core.train", lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints"))
    assert (done.returncode, len(done.stderr.splitlines())) == (TRY_AGAIN, 1), done.stderr
    assert f"{s3.bucket_url}/checkpoints/tiny" in done.stderr
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_a_bucket_that_takes_nothing_is_refused_at_the_start_in_one_sentence(lab: Any, tmp_path: Path, s3: S3) -> None:
    s3.fail("PUT", ".tmp", times=1 << 30, status=403)
    done = lab.run("gpt2core.train", lab.flags(tmp_path, checkpoint_dir=f"{s3.bucket_url}/checkpoints"))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"{s3.bucket_url}/checkpoints/tiny" in done.stderr
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_ranks_that_read_different_checkpoints_do_not_train(lab: Any, remote_run: Path, s3: S3) -> None:
    """One of the two cannot read latest.pt and would go on from the one before."""
    for name in ("rolling_step_000024", "epoch_00002", "best_model"):
        s3.filesystem.rm(f"{s3.bucket}/checkpoints/tiny/{name}.pt")
    s3.fail("GET", "latest.pt", times=1, status=403)
    before = (remote_run / "metrics.jsonl").read_bytes()
    flags = lab.flags(remote_run.parent, checkpoint_dir=f"{s3.bucket_url}/checkpoints")
    done = lab.run("gpt2core.cli", ["train", "--nproc_per_node", "2", *flags, "--resume", "latest"])
    assert done.returncode == TRY_AGAIN, done.stdout
    assert "the ranks could read checkpoints of different steps" in done.stdout
    assert "WARNING: skipped" in done.stdout
    assert (remote_run / "metrics.jsonl").read_bytes() == before


# --- commands --------------------------------------------------------------------------------------------------------


def test_checkpoints_commands_work_on_a_url(remote_run: Path, s3: S3, capsys: Any) -> None:
    folder = ["--folder", f"{s3.bucket_url}/checkpoints/tiny"]
    of_run = ["--run_name", "tiny", "--artifacts_dir", str(remote_run.parent)]
    for where in (folder, of_run):
        assert gpt2(["checkpoints", "list", *where]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("latest_backup", "epoch_00002", "rolling_step_000024", folder[1]))
    assert gpt2(["checkpoints", "show", "epoch_00001", *folder]) == 0
    assert f"{folder[1]}/epoch_00001.pt" in capsys.readouterr().out
    assert gpt2(["checkpoints", "du", *folder]) == 0
    stored = sum(len(content) for name, content in s3.contents("checkpoints/tiny").items() if name.endswith(".pt"))
    assert f"{stored / 1e6:.1f} MB stored" in capsys.readouterr().out
    assert gpt2(["checkpoints", "verify", *folder]) == 0
    assert capsys.readouterr().out.count(": whole") == 8
    damaged = bytearray(s3.contents("checkpoints/tiny")["epoch_00001.pt"])
    damaged[len(damaged) // 2] ^= 1
    s3.add("checkpoints/tiny/epoch_00001.pt", bytes(damaged))
    assert gpt2(["checkpoints", "verify", *folder]) == 1
    assert "epoch_00001: DAMAGED" in capsys.readouterr().out
    assert gpt2(["checkpoints", "prune", "--keep", "1", *folder]) == 0
    names = s3.contents("checkpoints/tiny")
    assert [name for name in names if "rolling" in name] == ["rolling_step_000024.json", "rolling_step_000024.pt"]
    assert "latest.pt" in names and "epoch_00002.pt" in names


def test_a_checkpoint_on_s3_is_measured_and_continues_a_text(
    lab: Any, remote_run: Path, straight: Path, s3: S3, capsys: Any
) -> None:
    of_run = ["--run_name", "tiny", "--artifacts_dir", str(remote_run.parent), "--device", "cpu"]
    gpt2(["evaluate", "--checkpoint", "latest", "--hellaswag", str(lab.examples(2)), *of_run])
    assert f"val_loss {lab.logged(straight, 'val_loss')[24]:.4f}" in capsys.readouterr().out
    texts = []
    for named in (
        "latest",
        f"{s3.bucket_url}/checkpoints/tiny/rolling_step_000024.pt",
        straight / "checkpoints/latest.pt",
    ):
        gpt2(["generate", "First Citizen:", "--max_new_tokens", "8", "--checkpoint", str(named), *of_run])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert gpt2(["status", "--artifacts_dir", str(remote_run.parent)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ tiny")]
    assert row.count("24") >= 3, "the step logged, the steps in all and the step saved"
    s3.fail("HEAD", "latest.pt", times=1 << 30, status=403)
    assert gpt2(["status", "--artifacts_dir", str(remote_run.parent)]) == 0
    assert re.search("tiny: its checkpoints are unreachable: s3://", capsys.readouterr().out)


def test_a_run_on_s3_is_not_written_over_in_silence(lab: Any, remote_run: Path, s3: S3, train_here: Any) -> None:
    flags = lab.flags(remote_run.parent, checkpoint_dir=f"{s3.bucket_url}/checkpoints")
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_here(flags)
    train_here([*flags, "--resume", "latest"])
    lab.assert_same_run(remote_run, remote_run)
