"""Measures one checkpoint: validation loss and HellaSwag. Run by `gpt2 evaluate` and by the evaluate stage."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from gpt2core import gpus, heartbeat
from gpt2core.board import write_evaluations
from gpt2core.config import EvalConfig, RunConfig
from gpt2core.distributed import Ranks
from gpt2core.evaluation import validation_loss
from gpt2core.flags import Parser, main_guard
from gpt2core.hellaswag import Example, Questions, evaluate_hellaswag, fingerprint, load_hellaswag
from gpt2core.launch import die_with_parent, tell
from gpt2core.loader import Sequences
from gpt2core.metrics import MetricsLog
from gpt2core.model import GPT
from gpt2core.records import Convention, Evaluation, HellaSwagScore
from gpt2core.report import evaluations
from gpt2core.run_checkpoint import NamedCheckpoint, load_named
from gpt2core.run_folder import RunFolder
from gpt2core.shards import cache_of, open_shards
from gpt2core.storage import read_text, write_text
from gpt2core.watchdog import show_stacks_when_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = RunConfig()
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|epoch_00003|PATH|URL", help="what to measure"
    )
    parser.add_argument("--run_name", default=defaults.run_name, help="run whose checkpoint it is")
    parser.add_argument("--artifacts_dir", default=defaults.artifacts_dir, help="folder of the runs")
    parser.add_argument("--data_dir", help="shards to measure on, if not those it was trained on")
    parser.add_argument("--hellaswag", metavar="PATH_OR_URL", help="jsonl file or hub dataset, if not the run's own")
    parser.add_argument(
        "--hellaswag_convention",
        choices=["build-nanogpt", "lm-eval", "both"],
        help="how to read and to count it, if not as the run's settings say",
    )
    parser.add_argument("--val_tokens", type=int, help="tokens of the validation shard, if not the run's own number")
    gpus.add_arguments(parser, if_busy="wait")
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")
    parser.add_argument("--heartbeat", metavar="FILE", type=Path, help="touch it at every progress, for a watchdog")
    parser.add_argument("--result", metavar="FILE", type=Path, help="write the result here, too, as JSON")


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Measures the checkpoint, or answers from the stored result of the same measurement.

    The result of a run's checkpoint goes to evaluations/ in the run's folder, its log, metrics and TensorBoard; that of
    another one lies beside it.
    """
    folder = RunFolder(arguments.artifacts_dir, arguments.run_name)
    with contextlib.ExitStack() as held:
        result = _measured(arguments, folder, load_named(arguments.checkpoint, folder), held)
    if arguments.result:
        write_text(arguments.result, result.model_dump_json())
    return result


def _measured(
    arguments: argparse.Namespace, folder: RunFolder, checkpoint: NamedCheckpoint, held: contextlib.ExitStack
) -> Evaluation:
    config = checkpoint.config
    asked = {name: getattr(arguments, name) for name in ("val_tokens", "hellaswag", "hellaswag_convention")}
    wanted = EvalConfig.model_validate(
        config.evaluation.model_dump() | {name: value for name, value in asked.items() if value is not None}
    )
    data_dir = arguments.data_dir or config.data.data_dir
    val = Sequences(open_shards(data_dir, "val", cache_of(config.data, tell)), config.model.context_length)
    hellaswag = _load_hellaswag(wanted, required=arguments.hellaswag is not None)
    is_own = data_dir == config.data.data_dir and (wanted.val_tokens, wanted.hellaswag) == (
        config.evaluation.val_tokens,
        config.evaluation.hellaswag,
    )
    stored_in = _result_file(checkpoint, folder, "" if is_own else "_" + _digest(wanted, val))
    identity = checkpoint.sha256 or checkpoint.weights_sha256()
    stored = _stored(stored_in, (identity, wanted.val_tokens, val.fingerprint))
    if stored and not arguments.force and (hellaswag is None or hellaswag.is_answered_by(stored)):
        print(f"already measured at {stored.measured_at}: {stored_in} (--force measures again)", flush=True)
        return stored
    ranks = gpus.join(arguments.device, arguments.if_gpu_busy, held, f"evaluating {checkpoint.name}")
    started = time.perf_counter()  # having waited
    model = checkpoint.model(ranks.device, config.train.precision)
    print(f"{checkpoint.name}: validation loss on {data_dir} ...", flush=True)
    val_loss = validation_loss(
        lambda inputs, targets: model(inputs, targets, reduction="none"),
        val,
        wanted.val_tokens,
        config.batch_size_without_gradients(),
        ranks,
    )
    scores = hellaswag.scores(model, ranks) | hellaswag.kept_from(stored) if hellaswag else {}
    result = Evaluation(
        run_name=config.run_name,
        checkpoint=checkpoint.name,
        sha256=identity,
        step=checkpoint.state["step"],
        epoch=checkpoint.state["epoch"],
        val_loss=val_loss.mean,
        val_loss_stderr=val_loss.stderr,
        perplexity=val_loss.perplexity,
        bits_per_byte=val_loss.bits_per_byte,
        val_tokens=wanted.val_tokens,
        val_fingerprint=val.fingerprint,
        hellaswag=scores.get("build-nanogpt"),
        hellaswag_lm_eval=scores.get("lm-eval"),
        duration_s=time.perf_counter() - started,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if ranks.is_main:
        _store(stored_in, result)
        if checkpoint.is_of_a_run and is_own:
            _log(folder, config, result)
    ranks.leave()
    return result


def _digest(wanted: EvalConfig, val: Sequences) -> str:
    """Tells measurements on other data than the run's own apart."""
    return hashlib.sha256(f"{val.fingerprint} {wanted.val_tokens} {wanted.hellaswag}".encode()).hexdigest()[:8]


def _result_file(checkpoint: NamedCheckpoint, folder: RunFolder, suffix: str) -> str:
    if checkpoint.is_of_a_run:
        return str(folder.evaluations / f"step_{checkpoint.state['step']:06d}{suffix}.json")
    return f"{checkpoint.name.rstrip('/').removesuffix('.pt')}.evaluation{suffix}.json"


def _stored(location: str, measured_on: tuple[str, int, str]) -> Evaluation | None:
    """What is stored there, if it is of these weights on these tokens."""
    try:
        stored = Evaluation.model_validate_json(read_text(location))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return stored if (stored.sha256, stored.val_tokens, stored.val_fingerprint) == measured_on else None


def _store(location: str, result: Evaluation) -> None:
    try:
        write_text(location, result.model_dump_json(indent=2) + "\n")
    except (OSError, NotImplementedError) as error:  # beside a checkpoint that may be only ours to read
        print(f"WARNING: the result is not kept, for {location} cannot be written ({error})", flush=True)


@dataclass(frozen=True)
class _HellaSwag:
    """The questions to be asked, and by which conventions."""

    source: str
    examples: list[Example]
    fingerprint: str
    conventions: list[Convention]

    def is_answered_by(self, stored: Evaluation) -> bool:
        there = _scores_of(stored)
        return all(
            convention in there and there[convention].fingerprint == self.fingerprint for convention in self.conventions
        )

    def kept_from(self, stored: Evaluation | None) -> dict[Convention, HellaSwagScore]:
        """What was measured before on the same examples by conventions that are not asked for now."""
        return {
            convention: score
            for convention, score in (_scores_of(stored) if stored else {}).items()
            if convention not in self.conventions and score.fingerprint == self.fingerprint
        }

    def scores(self, model: GPT, ranks: Ranks) -> dict[Convention, HellaSwagScore]:
        return {convention: self._score(convention, model, ranks) for convention in self.conventions}

    def _score(self, convention: Convention, model: GPT, ranks: Ranks) -> HellaSwagScore:
        print(f"HellaSwag by {convention}'s convention, {len(self.examples)} examples of {self.source} ...", flush=True)
        questions = Questions.of(self.examples, convention, model.config.context_length)
        score = evaluate_hellaswag(model, questions, ranks)
        return score.model_copy(update={"source": self.source, "fingerprint": self.fingerprint})


def _scores_of(stored: Evaluation) -> dict[Convention, HellaSwagScore]:
    return {score.convention: score for score in (stored.hellaswag, stored.hellaswag_lm_eval) if score}


def _load_hellaswag(wanted: EvalConfig, required: bool) -> _HellaSwag | None:
    """None, with a loud word, when the default source cannot be reached."""
    source, convention = wanted.hellaswag, wanted.hellaswag_convention
    try:
        examples = load_hellaswag(source)
    except ValueError as error:
        if required or source != EvalConfig().hellaswag:
            raise
        print(f"WARNING: evaluated without HellaSwag: {error}", flush=True)
        return None
    conventions: list[Convention] = ["build-nanogpt", "lm-eval"] if convention == "both" else [convention]
    if convention == "both" and not all(example.has_parts for example in examples):
        print(f"WARNING: {source} lacks what lm-eval's convention needs: activity_label, ctx_a and ctx_b", flush=True)
        conventions = ["build-nanogpt"]
    return _HellaSwag(source, examples, fingerprint(examples), conventions)


def _log(folder: RunFolder, config: RunConfig, result: Evaluation) -> None:
    log = MetricsLog(folder, resume_at=None)
    values = {"val_loss": result.val_loss}
    if score := result.hellaswag:
        values |= score.model_dump(include={"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "examples"})
    log.numbers(result.step, **values)
    log.close()
    if config.train.use_tensorboard:
        write_evaluations(folder.tensorboard, list(evaluations(folder).values()))


def describe(result: Evaluation) -> str:
    """The result in a line."""
    error = "" if result.val_loss_stderr is None else f" ± {result.val_loss_stderr:.4f}"
    line = f"{result.checkpoint} (step {result.step}): val_loss {result.val_loss:.4f}{error}, perplexity {result.perplexity:.2f}"
    if result.bits_per_byte is not None:
        line += f", {result.bits_per_byte:.4f} bits a byte"
    for score in (result.hellaswag, result.hellaswag_lm_eval):
        if score:
            cut = f", {score.truncated} contexts cut" if score.truncated else ""
            line += (
                f"; HellaSwag ({score.convention}, {score.examples} examples{cut}) "
                f"acc {score.acc:.4f} ± {score.acc_stderr:.4f}, acc_norm {score.acc_norm:.4f} ± {score.acc_norm_stderr:.4f}"
            )
    return line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.evaluate", description="Measure a checkpoint.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    parent, is_main = die_with_parent(), os.environ.get("RANK", "0") == "0"
    show_stacks_when_asked()
    if arguments.heartbeat and is_main and (own := heartbeat.Rank.own(parent)):
        heartbeat.begin(arguments.heartbeat, [own])
    result = evaluate(arguments)
    if is_main:
        print(describe(result))


if __name__ == "__main__":
    main_guard(main)
