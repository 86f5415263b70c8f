"""Makes the best measured model of a run the one in artifacts/best/, if it beats what is there.

artifacts/best -> promoted/0002_demo_step_000080     switched by renaming a link: readers see the old or the new
artifacts/promoted/history.jsonl                     every decision, one JSON object a line
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from gpt2core.checkpoint import load
from gpt2core.checkpoint_folder import Checkpoint, CheckpointFolder
from gpt2core.config import ModelConfig, RunConfig
from gpt2core.export import export_huggingface
from gpt2core.flags import Parser, main_guard
from gpt2core.launch import die_with_parent
from gpt2core.records import Contender, Evaluation, Promotion, current_best
from gpt2core.run_folder import RunFolder
from gpt2core.storage import fsync, read_json_lines, write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = RunConfig()
    parser.add_argument("--run_name", default=defaults.run_name, help="run whose measured checkpoints are candidates")
    parser.add_argument("--artifacts_dir", default=defaults.artifacts_dir, help="folder of the runs and of best/")
    parser.add_argument("--force", action="store_true", help="replace a best that was measured on other data")


def promote(artifacts_dir: str | Path, run_name: str, force: bool = False) -> Promotion:
    """Decides on the run's candidate of lowest validation loss; only a strictly lower loss than best's is promoted.

    Raises ValueError when the run has no measured checkpoint.
    """
    artifacts, folder = Path(artifacts_dir), RunFolder(artifacts_dir, run_name)
    holder = current_best(artifacts)
    checkpoint, evaluation, candidate = best_candidate(folder, holder)
    promoted, reason = judge(candidate, holder)
    if force and holder and not candidate.compares_with(holder):
        promoted, reason = True, f"by --force, in place of {holder.run_name}, which was measured on other data"
    decision = Promotion(
        promoted=promoted,
        reason=reason,
        candidate=candidate,
        beaten=holder,
        decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if promoted:
        _publish(artifacts, checkpoint, evaluation, decision)
    _remember(artifacts, decision)
    write_text(folder.promotion_file, decision.model_dump_json(indent=2) + "\n")
    return decision


def best_candidate(folder: RunFolder, holder: Contender | None) -> tuple[Checkpoint, Evaluation, Contender]:
    """The run's checkpoint with the lowest measured loss, among those measured on the holder's data if there are any.

    One without a measurement, or with NaN, is no candidate.
    """
    checkpoints = CheckpointFolder(folder.checkpoints).all()
    by_content = {checkpoint.sidecar.sha256: checkpoint for checkpoint in reversed(checkpoints)}
    candidates = []
    for path in sorted(folder.evaluations.glob("step_*.json")):
        try:
            evaluation = Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(
                f"{path} is no evaluation ({error.errors()[0]['msg']}): remove it and evaluate again"
            ) from None
        if evaluation.sha256 in by_content and evaluation.val_loss == evaluation.val_loss:
            checkpoint = by_content[evaluation.sha256]
            candidates.append((checkpoint, evaluation, _contender(checkpoint, evaluation)))
    if not candidates:
        raise ValueError(
            f"{folder.path} has no measured checkpoint to promote: "
            f"run `gpt2 evaluate --run_name {folder.path.name} --checkpoint best` first"
        )
    comparable = [found for found in candidates if holder and found[2].compares_with(holder)]
    return min(comparable or candidates, key=lambda found: (found[2].val_loss, found[2].step))


def _contender(checkpoint: Checkpoint, evaluation: Evaluation) -> Contender:
    return Contender(
        run_name=evaluation.run_name,
        checkpoint=checkpoint.name,
        step=evaluation.step,
        val_loss=evaluation.val_loss,
        val_fingerprint=evaluation.val_fingerprint,
        val_tokens=evaluation.val_tokens,
    )


def judge(candidate: Contender, holder: Contender | None) -> tuple[bool, str]:
    """Whether the candidate takes the place, and why; a tie never does."""
    if holder is None:
        return True, f"first to be promoted, val_loss {candidate.val_loss:.4f}"
    if not candidate.compares_with(holder):
        return False, (
            f"measured on other validation data than {holder.run_name} step {holder.step}, so the losses do not compare; "
            f"evaluate both on one --data_dir and --val_tokens, or replace it with --force"
        )
    margin = f"val_loss {candidate.val_loss:.4f} against {holder.val_loss:.4f} of {holder.run_name} step {holder.step}"
    if candidate.val_loss < holder.val_loss:
        return True, f"better: {margin}"
    if candidate.val_loss == holder.val_loss:
        return False, f"a tie, which never promotes: {margin}"
    return False, f"not better: {margin}"


def _publish(artifacts: Path, checkpoint: Checkpoint, evaluation: Evaluation, decision: Promotion) -> None:
    """Builds the new folder beside the old one, whole, and then moves the link `best` to it."""
    versions = artifacts / "promoted"
    versions.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[:4]) for path in versions.glob("[0-9][0-9][0-9][0-9]_*")), default=0)
    name = f"{number:04d}_{decision.candidate.run_name}_step_{decision.candidate.step:06d}"
    building = versions / f".{name}.{os.getpid()}"
    state = load(checkpoint.location, checkpoint.sidecar)
    export_huggingface(state["model"], ModelConfig.model_validate(state["config"]["model"]), building)
    write_json(building / "training_config.json", state["config"])
    write_text(building / "evaluation.json", evaluation.model_dump_json(indent=2) + "\n")
    write_text(building / "promotion.json", decision.model_dump_json(indent=2) + "\n")
    building.rename(versions / name)
    fsync(versions)
    link = artifacts / f".best.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("promoted") / name)
    link.replace(artifacts / "best")
    fsync(artifacts)
    for stray in versions.glob(".[0-9][0-9][0-9][0-9]_*"):  # of a promotion that was killed
        shutil.rmtree(stray, ignore_errors=True)


def _remember(artifacts: Path, decision: Promotion) -> None:
    """Appends to the history, but for a decision that only repeats the last one."""
    history = artifacts / "promoted" / "history.jsonl"
    history.parent.mkdir(parents=True, exist_ok=True)
    last = [line["candidate"] for line in read_json_lines(history)][-1:]
    if decision.promoted or last != [decision.candidate.model_dump()]:
        with history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(decision.model_dump()) + "\n")


def describe(decision: Promotion) -> str:
    """The decision in a line."""
    candidate = decision.candidate
    verdict = "promoted" if decision.promoted else "kept what is best"
    return f"{verdict}: {candidate.run_name} {candidate.checkpoint} (step {candidate.step}) {decision.reason}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.promote", description="Promote the best measured model.")
    add_arguments(parser)
    die_with_parent()
    arguments = parser.parse_args(argv)
    print(describe(promote(arguments.artifacts_dir, arguments.run_name, arguments.force)))


if __name__ == "__main__":
    main_guard(main)
