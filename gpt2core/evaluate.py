"""Measures one checkpoint: validation loss and HellaSwag. Run by `gpt2 evaluate` and by the evaluate stage."""

from __future__ import annotations

import argparse
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from gpt2core.board import write_evaluations
from gpt2core.config import EvalConfig, RunConfig
from gpt2core.distributed import Ranks
from gpt2core.evaluation import validation_loss
from gpt2core.flags import Parser, main_guard
from gpt2core.hellaswag import evaluate_hellaswag, load_hellaswag
from gpt2core.launch import die_with_parent, tell
from gpt2core.loader import Sequences
from gpt2core.metrics import MetricsLog
from gpt2core.records import Evaluation, HellaSwagScore
from gpt2core.report import evaluations
from gpt2core.run_checkpoint import NamedCheckpoint, load_named
from gpt2core.run_folder import RunFolder
from gpt2core.shards import cache_of, open_shards
from gpt2core.storage import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = RunConfig()
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|epoch_00003|PATH|URL", help="what to measure"
    )
    parser.add_argument("--run_name", default=defaults.run_name, help="run whose checkpoint it is")
    parser.add_argument("--artifacts_dir", default=defaults.artifacts_dir, help="folder of the runs")
    parser.add_argument("--data_dir", help="shards to measure on, if not those it was trained on")
    parser.add_argument("--hellaswag", metavar="PATH_OR_URL", help="jsonl file or hub dataset, if not the run's own")
    parser.add_argument("--val_tokens", type=int, help="tokens of the validation shard, if not the run's own number")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    parser.add_argument("--force", action="store_true", help="measure again what was measured before")


def evaluate(arguments: argparse.Namespace) -> Evaluation:
    """Measures the checkpoint, or answers from the stored result of the same measurement.

    The result goes to evaluations/step_XXXXXX.json in the run's folder, its log, metrics and TensorBoard.
    """
    started = time.perf_counter()
    folder = RunFolder(arguments.artifacts_dir, arguments.run_name)
    checkpoint = load_named(arguments.checkpoint, folder)
    config = checkpoint.config
    wanted = EvalConfig(
        val_tokens=config.evaluation.val_tokens if arguments.val_tokens is None else arguments.val_tokens,
        hellaswag=arguments.hellaswag or config.evaluation.hellaswag,
    )
    data_dir = arguments.data_dir or config.data.data_dir
    val = Sequences(open_shards(data_dir, "val", cache_of(config.data, tell)), config.model.context_length)
    stored_in = folder.evaluations / f"step_{checkpoint.state['step']:06d}.json" if checkpoint.sha256 else None
    if stored_in and not arguments.force and (stored := _stored(stored_in)) and _same(stored, checkpoint, wanted, val):
        print(f"already measured at {stored.measured_at}: {stored_in} (--force measures again)", flush=True)
        return stored
    ranks = Ranks.join(arguments.device)
    model = checkpoint.model(ranks.device.type, config.train.precision)
    print(f"{checkpoint.name}: validation loss on {data_dir} ...", flush=True)
    val_loss = validation_loss(
        lambda inputs, targets: model(inputs, targets, reduction="none"),
        val,
        wanted.val_tokens,
        config.batch_size_without_gradients(),
        ranks,
    )
    result = Evaluation(
        run_name=config.run_name,
        checkpoint=checkpoint.name,
        sha256=checkpoint.sha256,
        step=checkpoint.state["step"],
        epoch=checkpoint.state["epoch"],
        val_loss=val_loss,
        perplexity=math.exp(min(val_loss, 700.0)),
        val_tokens=wanted.val_tokens,
        val_fingerprint=val.fingerprint,
        hellaswag=_hellaswag_score(model, wanted.hellaswag, ranks, required=arguments.hellaswag is not None),
        duration_s=time.perf_counter() - started,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if stored_in and ranks.is_main:
        write_text(stored_in, result.model_dump_json(indent=2) + "\n")
        _log(folder, config, result)
    ranks.leave()
    return result


def _stored(path: Path) -> Evaluation | None:
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def _same(stored: Evaluation, checkpoint: NamedCheckpoint, wanted: EvalConfig, val: Sequences) -> bool:
    """Whether the stored result is of these weights, on this data."""
    measured_on = (
        stored.sha256,
        stored.val_tokens,
        stored.val_fingerprint,
        stored.hellaswag and stored.hellaswag.source,
    )
    return measured_on == (checkpoint.sha256, wanted.val_tokens, val.fingerprint, wanted.hellaswag)


def _hellaswag_score(model, source: str, ranks: Ranks, required: bool) -> HellaSwagScore | None:  # type: ignore[no-untyped-def]
    try:
        examples = load_hellaswag(source)
    except ValueError as error:
        if required or source != EvalConfig().hellaswag:
            raise
        print(f"WARNING: evaluated without HellaSwag: {error}", flush=True)
        return None
    print(f"HellaSwag, {len(examples)} examples of {source} ...", flush=True)
    result = evaluate_hellaswag(model, examples, ranks)
    return HellaSwagScore(
        source=source,
        examples=result.examples,
        acc=result.acc,
        acc_stderr=result.acc_stderr,
        acc_norm=result.acc_norm,
        acc_norm_stderr=result.acc_norm_stderr,
    )


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
    line = (
        f"{result.checkpoint} (step {result.step}): val_loss {result.val_loss:.4f}, perplexity {result.perplexity:.2f}"
    )
    if score := result.hellaswag:
        line += (
            f", HellaSwag ({score.convention}, {score.examples} examples) acc {score.acc:.4f} ± {score.acc_stderr:.4f}, "
            f"acc_norm {score.acc_norm:.4f} ± {score.acc_norm_stderr:.4f}"
        )
    return line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.evaluate", description="Measure a checkpoint.")
    add_arguments(parser)
    die_with_parent()
    result = evaluate(parser.parse_args(argv))
    if os.environ.get("RANK", "0") == "0":
        print(describe(result))


if __name__ == "__main__":
    main_guard(main)
