"""The ten-second answer, from files alone: is a run alive, how far, how good, how fast, when done, what went wrong."""

from __future__ import annotations

import math
import shutil
import socket
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from gpt2core import attempts, heartbeat, lock, log_history
from gpt2core.checkpoint_folder import LATEST, CheckpointFolder, epoch_name
from gpt2core.config import RunConfig
from gpt2core.flags import read_config
from gpt2core.listing import age, fits, number, show, size, table
from gpt2core.log_line import short_duration
from gpt2core.records import Contender, Record, current_best, read_promotion
from gpt2core.report import evaluations
from gpt2core.run_folder import RunFolder
from gpt2core.shards import read_manifest
from gpt2core.storage import is_remote

SILENT_S = 300.0  # without a sign of life, after which a trainer is said to be silent
WARNINGS_SHOWN = 3

State = Literal["training", "silent", "between stages", "done", "stopped", "unreadable"]


class StageStatus(Record):
    """One stage of the pipeline: what there is of it on disk."""

    stage: str
    done: bool
    note: str


class RunStatus(Record):
    """What the files of a run say of it."""

    model_config = ConfigDict(ser_json_inf_nan="null")  # programs read it

    run_name: str
    state: State
    alive: str | None = None  # who works on it
    beat_s_ago: float | None = None  # seconds since the trainer's last sign of life
    step: int | None = None
    max_steps: int | None = None
    epoch: int | None = None  # under way, counted from 1
    num_epochs: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    tokens_per_sec: float | None = None
    mfu: float | None = None
    eta_s: float | None = None
    done_at: str | None = None  # when it will be done at this pace: UTC, ISO 8601; None when it makes no progress
    saved_step: int | None = None
    saved_s_ago: float | None = None
    checkpoint_bytes: int | None = None
    unreachable: str | None = None  # why the checkpoints' storage could not be asked
    free_bytes: int | None = None
    resumes: int = 0
    steps_lost: int = 0
    last_resume: attempts.Resume | None = None
    died_of: str | None = None  # how the last attempt ended, when it did not end well
    warnings: tuple[str, ...] = ()  # the last few of log.txt
    num_warnings: int = 0
    stages: tuple[StageStatus, ...] = ()
    problem: str | None = None  # why the files cannot be read


def find_runs(artifacts: Path) -> list[RunFolder]:
    """The runs under the folder. Raises ValueError when there is no such folder."""
    if not artifacts.is_dir():
        raise ValueError(f"--artifacts_dir {artifacts}: there is no such folder")
    return [  # a promoted model is a folder with a config.json, too
        RunFolder(artifacts, path.parent.name)
        for path in sorted(artifacts.glob("*/config.json"))
        if not (path.parent / "model.safetensors").exists()
    ]


def status_of(folder: RunFolder, is_end_of_flow: bool = False) -> RunStatus:
    """What there is to say of a run; of one with a damaged file, which. At the end of its flow, which still holds the
    run's lock, one whose steps are all done is done."""
    try:
        return _status_of(folder, is_end_of_flow)
    except (ValueError, OSError) as error:
        return RunStatus(run_name=folder.path.name, state="unreadable", problem=str(error))


def _status_of(folder: RunFolder, is_end_of_flow: bool) -> RunStatus:
    config = read_config(folder.config_file)
    resumes, died_of = _history(folder)
    measured = _latest(folder)
    state, alive, beat_s_ago = _liveness(folder)
    if is_end_of_flow and state == "between stages":
        state, alive = "stopped", None
    max_steps = measured.get("max_steps") or _max_steps(config)
    step = measured.get("step")
    if state == "stopped" and step is not None and step == max_steps:
        state = "done"
    eta_s = measured.get("eta_s")
    num_epochs = config.train.num_epochs
    warnings, num_warnings = _warnings(folder)
    return RunStatus(
        run_name=folder.path.name,
        state=state,
        alive=alive,
        beat_s_ago=beat_s_ago,
        step=step,
        max_steps=max_steps,
        epoch=None if not max_steps or step is None else min(num_epochs, 1 + step * num_epochs // max_steps),
        num_epochs=num_epochs,
        **{key: measured.get(key) for key in _MEASURED},
        best_val_loss=measured.get("best_val_loss"),
        eta_s=eta_s,
        done_at=_in(eta_s) if alive and state != "silent" and eta_s else None,
        free_bytes=shutil.disk_usage(folder.path).free,
        **_saved(folder),
        resumes=len(resumes),
        steps_lost=sum(resume.steps_lost for resume in resumes),
        last_resume=resumes[-1] if resumes else None,
        died_of=died_of if state == "stopped" or (state == "between stages" and died_of != attempts.CUT_OFF) else None,
        warnings=tuple(warnings),
        num_warnings=num_warnings,
        stages=tuple(_stages(folder, config, step, max_steps)),
    )


_MEASURED = ("loss", "val_loss", "acc_norm", "acc_norm_stderr", "tokens_per_sec", "mfu")


def _history(folder: RunFolder) -> tuple[list[attempts.Resume], str | None]:
    """All resumes, oldest first, and why the last attempt ended before it was done.

    attempts.json knows of what the pipeline started, log.txt of the rest.
    """
    recorded = attempts.read(folder)
    ended = log_history.starts(folder)

    def is_recorded(at: str) -> bool:
        return any(one.began_at <= at and (one.ended_at is None or at <= one.ended_at) for one in recorded)

    others = [resume for resume in log_history.resumes(ended) if not is_recorded(resume.at)]
    resumes = sorted([*attempts.resumes(folder), *others], key=lambda resume: resume.at)
    if ended and not is_recorded(ended[-1].at) and (not recorded or ended[-1].at > recorded[-1].began_at):
        return resumes, ended[-1].failure
    if recorded and recorded[-1].outcome == "running":
        return resumes, attempts.CUT_OFF
    return resumes, recorded[-1].error if recorded else None


def _latest(folder: RunFolder) -> dict[str, Any]:
    """The newest of each number; an evaluation may come after later steps."""
    in_order = sorted(folder.metrics(), key=lambda line: line["step"])
    latest = {name: value for line in in_order for name, value in line.items()}
    losses = [line["val_loss"] for line in in_order if "val_loss" in line and line["step"]]
    losses = [loss for loss in losses if not math.isnan(loss)]
    return latest | ({"best_val_loss": min(losses)} if losses else {})


def _liveness(folder: RunFolder) -> tuple[State, str | None, float | None]:
    beat_s_ago = None
    if folder.heartbeat_file.exists():
        beat_s_ago = max(0.0, time.time() - folder.heartbeat_file.stat().st_mtime)
    trainer = heartbeat.read(folder.heartbeat_file)
    holder = lock.holder(folder.path / lock.LOCK_FILE)
    is_silent = beat_s_ago is not None and beat_s_ago > SILENT_S
    if holder is None and trainer and trainer.host != socket.gethostname() and not is_silent:
        holder = f"a trainer on {trainer.host}"  # whose locks may not show here
    if holder:
        return ("silent" if is_silent else "training"), holder, beat_s_ago
    if flow := lock.holder(folder.path / lock.FLOW_LOCK_FILE):
        return "between stages", flow, beat_s_ago
    return "stopped", None, beat_s_ago


def _saved(folder: RunFolder) -> dict[str, Any]:
    checkpoints = CheckpointFolder(folder.checkpoints)
    try:
        saved = checkpoints.find(LATEST)
        stored = checkpoints.disk_bytes()
    except (ConnectionError, ValueError) as error:  # of remote storage; the rest is still worth a look
        return {"unreachable": str(error)}
    if saved is None:
        return {"checkpoint_bytes": stored}
    since = (datetime.now(UTC) - datetime.fromisoformat(saved.sidecar.saved_at)).total_seconds()
    return {"saved_step": saved.sidecar.step, "saved_s_ago": max(0.0, since), "checkpoint_bytes": stored}


def _max_steps(config: RunConfig) -> int | None:
    steps = config.train.steps_per_epoch
    return None if steps == "auto" else steps * config.train.num_epochs


def _in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="minutes")


def _warnings(folder: RunFolder) -> tuple[list[str], int]:
    """The last few lines of log.txt that warn, and how many there are."""
    last: deque[str] = deque(maxlen=WARNINGS_SHOWN)
    count = 0
    if folder.log_file.exists():
        with folder.log_file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if "WARNING" in line:
                    count += 1
                    last.append(line.strip())
    return list(last), count


def _stages(folder: RunFolder, config: RunConfig, step: int | None, max_steps: int | None) -> list[StageStatus]:
    measured = evaluations(folder)
    epochs = config.train.num_epochs
    ends = _epoch_ends(folder, epochs)
    latest = measured[max(measured)] if measured else None
    promotion = read_promotion(folder.promotion_file)
    return [
        StageStatus(stage="prepare", **_prepared(config)),
        StageStatus(
            stage="train",
            done=len(ends) == epochs,
            note=f"step {step or 0:,} of {max_steps or '?':,}, {len(ends)} of {epochs} epochs"
            if max_steps
            else f"step {step or 0:,}, {len(ends)} of {epochs} epochs",
        ),
        StageStatus(
            stage="evaluate",
            done=len(ends) == epochs and set(ends) <= measured.keys(),
            note=f"{len(measured)} measured"
            + (f", the last {latest.checkpoint} with val_loss {latest.val_loss:.4f}" if latest else ""),
        ),
        StageStatus(
            stage="promote",
            done=promotion is not None,
            note=f"{'promoted' if promotion.promoted else 'kept'}, {promotion.reason}" if promotion else "nothing yet",
        ),
    ]


def _epoch_ends(folder: RunFolder, epochs: int) -> list[int]:
    """Last steps of the epochs that are finished."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    try:
        found = [checkpoints.find(epoch_name(epoch)) for epoch in range(1, epochs + 1)]
    except (ConnectionError, ValueError):
        return []
    return [checkpoint.sidecar.step for checkpoint in found if checkpoint]


def _prepared(config: RunConfig) -> dict[str, Any]:
    data_dir = config.data.data_dir
    if is_remote(data_dir):
        return {"done": True, "note": data_dir}
    try:
        manifest = read_manifest(data_dir)
    except ValueError as error:
        return {"done": False, "note": str(error)}
    if manifest:
        tokens = sum(shard.tokens for shard in manifest.shards)
        return {"done": True, "note": f"{tokens:,} tokens in {len(manifest.shards)} shards"}
    shards = len([*Path(data_dir).glob("*.npy"), *Path(data_dir).glob("*.bin")])
    return {"done": shards > 1, "note": f"{shards} shards without a manifest in {data_dir}"}


# --- for people ------------------------------------------------------------------------------------------------------


def print_status(artifacts: Path) -> None:
    """Every run under the folder in a table, then what else is to be said of each; and the promoted model."""
    found = [status_of(folder) for folder in find_runs(artifacts)]
    if not found:
        print(f"no runs in {artifacts}")
        return
    title = f"runs in {artifacts}"
    made = table(title, _row(found[0]), [_row(run).values() for run in found])
    has_room = fits(made)
    show(made if has_room else table(title, _narrow_row(found[0]), [_narrow_row(run).values() for run in found]))
    for run in found:
        if not has_room and (rest := _rest(run)):
            print(f"{run.run_name}: {rest}")
        for line in details(run):
            print(line)
    try:
        print(promoted_line(current_best(artifacts)))
    except ValueError as error:
        print(f"promoted: unreadable: {error}")


def promoted_line(best: Contender | None) -> str:
    if best is None:
        return "promoted: nothing yet"
    return f"promoted: {best.run_name} step {best.step}, val_loss {best.val_loss:.4f}"


def _row(run: RunStatus) -> dict[str, Any]:
    return {
        "run": run.run_name,
        "state": run.state,
        "step": run.step,
        "of": run.max_steps,
        "train loss": number(run.loss),
        "val loss": number(run.val_loss),
        "acc_norm": number(run.acc_norm),
        "tokens/s": None if run.tokens_per_sec is None else f"{run.tokens_per_sec:,.0f}",
        "to go": None if run.eta_s is None or run.state == "done" else short_duration(run.eta_s),
        "saved": run.saved_step,
        "age": None if run.saved_s_ago is None else short_duration(run.saved_s_ago),
        "disk": None if run.checkpoint_bytes is None else size(run.checkpoint_bytes),
    }


NARROW = ("run", "state", "step", "val loss", "to go", "age")  # what fits 80 characters


def _narrow_row(run: RunStatus) -> dict[str, Any]:
    row = _row(run)
    if run.max_steps and run.step is not None:
        row["step"] = f"{run.step} of {run.max_steps}"
    return {name: row[name] for name in NARROW}


def _rest(run: RunStatus) -> str:
    """What a narrow row leaves out, in a line."""
    left_out = {name: value for name, value in _row(run).items() if name not in (*NARROW, "of") and value is not None}
    return ", ".join(f"{name} {value}" for name, value in left_out.items())


def details(run: RunStatus) -> list[str]:
    """What the table has no room for, a line each."""
    said = []
    if run.problem:
        said.append(f"unreadable: {run.problem}")
    if run.alive:
        beat = "" if run.beat_s_ago is None else f", last sign of life {short_duration(run.beat_s_ago)} ago"
        said.append(f"{run.state}, by {run.alive}{beat}" + (f", done about {run.done_at}" if run.done_at else ""))
    elif run.state == "stopped":
        said.append("not running")
    if run.died_of:
        said[-1] += f"; the last attempt: {run.died_of}"
    if run.unreachable:
        said.append(f"its checkpoints are unreachable: {run.unreachable}")
    if resume := run.last_resume:
        times = f"{run.resumes} time{'s' if run.resumes > 1 else ''}"
        said.append(
            f"resumed {times}, {run.steps_lost} steps lost in all; last {age(resume.at)} ago at step {resume.step} "
            f"({resume.steps_lost} lost): {resume.why}"
        )
    said += [f"{'done' if stage.done else 'open'}  {stage.stage:<9} {stage.note}" for stage in run.stages]
    if run.num_warnings:
        said.append(f"{run.num_warnings} warnings in log.txt, the last:")
        said += [f"  {warning}" for warning in run.warnings]
    if run.free_bytes is not None:
        said.append(f"free on its disk: {size(run.free_bytes)}")
    return [f"{run.run_name}: {line}" for line in said]
