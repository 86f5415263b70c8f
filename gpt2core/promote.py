"""Makes the best measured model of a run the one in artifacts/best/, if it beats what is there.

Candidates are the run's epoch checkpoints and its best one: the names under which weights stay. `latest` and the rolling
ones are on their way to something else.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt2core.checkpoint import load
from gpt2core.checkpoint_folder import BEST, Checkpoint, CheckpointFolder
from gpt2core.code_version import code_version
from gpt2core.config import ModelConfig, PromotionConfig, Rule, RunConfig
from gpt2core.export import export_huggingface
from gpt2core.flags import Parser, add_settings, main_guard, settings_of
from gpt2core.launch import die_with_parent
from gpt2core.model_card import write_card
from gpt2core.promoted import PromotedModels, print_history
from gpt2core.records import CodeVersion, Contender, Evaluation, Promotion, current_best
from gpt2core.run_folder import RunFolder
from gpt2core.storage import write_json, write_text

CANDIDATES = re.compile(rf"^(epoch_\d+|{BEST})$")
OWN_MEASUREMENT = re.compile(r"^step_\d+\.json$")  # with the run's own settings; others have a digest in their name
ATTEMPTS_TO_READ = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = RunConfig()
    parser.add_argument("--run_name", default=defaults.run_name, help="run whose measured checkpoints are candidates")
    parser.add_argument("--artifacts_dir", default=defaults.artifacts_dir, help="folder of the runs and of best/")
    parser.add_argument("--force", action="store_true", help="replace a best that was measured on other data")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--rollback", action="store_true", help="go back to the model that was best before this one")
    instead.add_argument("--history", action="store_true", help="show every decision so far")
    add_settings(parser, PromotionConfig)


def run(arguments: argparse.Namespace) -> None:
    """What the flags ask for, and a word on it."""
    models, settings = PromotedModels(arguments.artifacts_dir), settings_of(PromotionConfig, arguments)
    if arguments.history:
        print_history(models)
        return
    if arguments.rollback:
        with models.held():
            print(describe(models.roll_back()), flush=True)
    else:
        print(describe(promote(arguments.artifacts_dir, arguments.run_name, settings, arguments.force)), flush=True)
    if settings.publish_to:
        with models.held():
            print(models.publish(settings.publish_to))


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of the run with one measurement of it."""

    checkpoint: Checkpoint
    evaluation: Evaluation
    is_own: bool  # measured with the run's own settings

    @property
    def contender(self) -> Contender:
        measured = self.evaluation
        return Contender(
            run_name=measured.run_name,
            checkpoint=self.checkpoint.name,
            step=measured.step,
            val_loss=measured.val_loss,
            val_fingerprint=measured.val_fingerprint,
            val_tokens=measured.val_tokens,
            sha256=measured.sha256,
            hellaswag=measured.hellaswag,
        )


def promote(
    artifacts_dir: str | Path, run_name: str, settings: PromotionConfig = PromotionConfig(), force: bool = False
) -> Promotion:
    """Decides on the run's best candidate by the rule; only a strictly better one than what is best is promoted.

    Raises ValueError when the run has no candidate with the rule's number.
    """
    models, folder = PromotedModels(artifacts_dir), RunFolder(artifacts_dir, run_name)
    if not folder.evaluations.is_dir():  # nor is there a folder for promoted models to be made
        raise _unmeasured(folder)
    with models.held():
        holder = current_best(models.artifacts)
        for _ in range(ATTEMPTS_TO_READ):
            candidate = choose(find_candidates(folder, settings.rule), holder, settings.rule)
            decision = _decide(candidate.contender, holder, settings, force)
            if not decision.promoted:
                models.remember(decision)
                break
            if state := _load(folder, candidate.checkpoint):
                decision = decision.model_copy(update=_origin(models, candidate, state))
                models.add(decision, _builder(folder, candidate, state, decision))
                break
        else:
            raise BlockingIOError(f"{folder.checkpoints} changed whenever it was read: try again")
        write_text(folder.promotion_file, decision.model_dump_json(indent=2) + "\n")
    return decision


def _decide(contender: Contender, holder: Contender | None, settings: PromotionConfig, force: bool) -> Promotion:
    rule = settings.rule
    promoted, reason = judge(contender, holder, settings)
    ahead = None
    if holder and contender.compares_with(holder, rule):
        ahead = lead(contender, holder, rule)
    elif holder and force:
        promoted, reason = True, f"by --force, in place of {holder.run_name}, which was measured on other data"
    return Promotion(
        promoted=promoted,
        reason=reason,
        rule=rule,
        candidate=contender,
        beaten=holder,
        better_by=ahead and ahead.by,
        stderr=ahead and ahead.stderr,
        paired=ahead and ahead.paired,
        promoted_with=code_version(),
        decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


# --- candidates ------------------------------------------------------------------------------------------------------


def find_candidates(folder: RunFolder, rule: Rule) -> list[Candidate]:
    """The run's epoch and best checkpoints that have the rule's number, one entry a measurement.

    Raises ValueError, saying what is missing, when there is none; BlockingIOError when that may be for a moment only.
    """
    checkpoints = CheckpointFolder(folder.checkpoints)
    whole = [checkpoint for checkpoint in checkpoints.all() if CANDIDATES.match(checkpoint.name)]
    # one content may have several names; an epoch's stays where best_model.pt moves on
    by_content = {c.sidecar.sha256: c for c in sorted(whole, key=lambda c: c.name != BEST)}
    measured = [
        Candidate(by_content[evaluation.sha256], evaluation, OWN_MEASUREMENT.match(path.name) is not None)
        for path in sorted(folder.evaluations.glob("step_*.json"))
        if (evaluation := _read_evaluation(path)).sha256 in by_content
    ]
    found = [candidate for candidate in measured if _has_number(candidate.contender, rule)]
    if found:
        return found
    if BEST in checkpoints.names() and BEST not in [checkpoint.name for checkpoint in whole]:
        raise BlockingIOError(
            f"{checkpoints.file(BEST)} is just being written, or was never finished, and no other checkpoint is measured: "
            f"try again"
        )
    if not measured:
        raise _unmeasured(folder)
    names = ", ".join(sorted({candidate.checkpoint.name for candidate in measured}))
    raise ValueError(
        f"{folder.path} has no measured checkpoint to promote by {rule}: {names} was measured, but its {rule} is missing or "
        f"not finite; run `{_evaluate(folder)} --force{' --hellaswag PATH_OR_URL' if rule == 'acc_norm' else ''}`"
    )


def _unmeasured(folder: RunFolder) -> ValueError:
    return ValueError(
        f"{folder.path} has no measured checkpoint to promote (its epochs' and its best one are candidates): "
        f"run `{_evaluate(folder)}` first"
    )


def _evaluate(folder: RunFolder) -> str:
    return f"gpt2 evaluate --run_name {folder.path.name} --checkpoint best"


def _read_evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{path} is no evaluation: remove it and evaluate again") from None


def _has_number(contender: Contender, rule: Rule) -> bool:
    """Whether it was measured and is sound: weights with a loss of NaN are not, whatever else was measured."""
    number = contender.number(rule)
    return number is not None and math.isfinite(number) and math.isfinite(contender.val_loss)


def choose(candidates: list[Candidate], holder: Contender | None, rule: Rule) -> Candidate:
    """The best of those measured on the holder's data, if there are any, else of the run's own measurements."""
    comparable = [found for found in candidates if holder and found.contender.compares_with(holder, rule)]
    own = [found for found in candidates if found.is_own]
    return min(comparable or own or candidates, key=lambda found: _order(found.contender, rule))


def _order(contender: Contender, rule: Rule) -> tuple[float, int]:
    number = contender.number(rule)
    assert number is not None
    return (number if rule == "val_loss" else -number, contender.step)


# --- the rule --------------------------------------------------------------------------------------------------------


def judge(
    candidate: Contender, holder: Contender | None, settings: PromotionConfig = PromotionConfig()
) -> tuple[bool, str]:
    """Whether the candidate takes the place, and why; a tie never does."""
    rule = settings.rule
    if holder is None:
        return True, f"first to be promoted, {rule} {candidate.number(rule):.4f}"
    if not candidate.compares_with(holder, rule):
        return False, _why_not_comparable(candidate, holder, rule)
    ahead = lead(candidate, holder, rule)
    of_holder = f"{holder.number(rule):.4f} of {holder.run_name} step {holder.step}"
    compared = f"{rule} {candidate.number(rule):.4f} against {of_holder}"
    if ahead.by == 0:
        return False, f"a tie, which never promotes: {compared}"
    if not ahead.by > 0:
        return False, f"not better: {compared}"
    if ahead.stderr is None:
        return True, f"better: {compared}"
    measure = f"{compared}, {ahead.by / ahead.stderr:.2f} {ahead.measure}" if ahead.stderr else compared
    if ahead.by > settings.margin * ahead.stderr:
        return True, f"better: {measure}"
    return False, f"not better by more than {settings.margin:g} standard errors: {measure}"


@dataclass(frozen=True)
class Lead:
    """By how much a candidate is better than what is best: nats a token, or a share of the examples."""

    by: float
    stderr: float | None = None  # of that difference; a loss has none
    paired: bool | None = None
    measure: str = ""  # what the standard error is


def lead(candidate: Contender, holder: Contender, rule: Rule) -> Lead:
    """By how much the candidate is better, and for acc_norm the standard error of that difference.

    Where both kept their answers, it is McNemar's (1947, doi:10.1007/BF02295996), sqrt(b + c) / n: of n examples, b are
    right for the candidate alone and c for the holder alone, and were both as good, each of those b + c would be a toss
    of a coin. Else it is that of two independent samples, an upper estimate: answers to one question go together.
    """
    if rule == "val_loss":
        return Lead(holder.val_loss - candidate.val_loss)
    mine, others = candidate.hellaswag, holder.hellaswag
    assert mine and others
    if changed := mine.gained_and_lost(others):
        gained, lost = changed
        by, stderr = (gained - lost) / mine.examples, math.sqrt(gained + lost) / mine.examples
        return Lead(by, stderr, True, f"standard errors of the paired difference, {gained} gained and {lost} lost")
    stderr = math.hypot(mine.acc_norm_stderr, others.acc_norm_stderr)
    return Lead(mine.acc_norm - others.acc_norm, stderr, False, "standard errors of the difference, unpaired")


def _why_not_comparable(candidate: Contender, holder: Contender, rule: Rule) -> str:
    who = f"{holder.run_name} step {holder.step}"
    if rule == "val_loss":
        return (
            f"measured on other validation data than {who}, so the losses do not compare; "
            f"evaluate both on one --data_dir and --val_tokens, or replace it with --force"
        )
    if holder.hellaswag is None:
        return f"{who} was promoted without a HellaSwag result, so acc_norm does not compare; replace it with --force"
    return (
        f"measured on other HellaSwag examples than {who}, so acc_norm does not compare; "
        f"evaluate both on one --hellaswag, or replace it with --force"
    )


# --- what is promoted ------------------------------------------------------------------------------------------------


def _load(folder: RunFolder, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The checkpoint's content, None when training has put another one in its place meanwhile."""
    try:
        return load(checkpoint.location, checkpoint.sidecar)
    except ValueError:
        if CheckpointFolder(folder.checkpoints).find(checkpoint.name) == checkpoint:
            raise
        return None


def _origin(models: PromotedModels, candidate: Candidate, state: dict[str, Any]) -> dict[str, Any]:
    """What the record of a promotion has beside the decision."""
    code = state.get("code")  # older checkpoints have none, and imported weights neither that nor data
    return {
        "version": models.next_version(candidate.contender),
        "replaced": models.link.readlink().name if models.link.exists() else None,
        "train_fingerprint": state.get("data", {}).get("fingerprint"),
        "trained_with": CodeVersion.model_validate(code) if code else None,
    }


def _builder(
    folder: RunFolder, candidate: Candidate, state: dict[str, Any], decision: Promotion
) -> Callable[[Path], None]:
    """What fills the folder of a promoted model."""
    evaluation, location = candidate.evaluation, candidate.checkpoint.location
    run = folder.until(evaluation.step)

    def build(target: Path) -> None:
        export_huggingface(state["model"], ModelConfig.model_validate(state["config"]["model"]), target, location)
        write_json(target / "training_config.json", state["config"])
        write_text(target / "evaluation.json", evaluation.model_dump_json(indent=2) + "\n")
        write_text(target / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in run.metrics()))
        write_card(target, decision, evaluation, state, run)

    return build


def describe(decision: Promotion) -> str:
    """The decision in a line."""
    candidate = decision.candidate
    if decision.action == "rollback":
        return f"rolled back: best is {candidate.run_name} {candidate.checkpoint} (step {candidate.step}) again"
    verdict = "promoted" if decision.promoted else "kept what is best"
    return f"{verdict}: {candidate.run_name} {candidate.checkpoint} (step {candidate.step}) {decision.reason}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.promote", description="Promote the best measured model.")
    add_arguments(parser)
    die_with_parent()
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main_guard(main)
