"""README.md of a promoted model, as the Hugging Face hub shows it: figures, curves, and where the model comes from."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpt2core import curves
from gpt2core.config import RunConfig
from gpt2core.records import CodeVersion, Evaluation, HellaSwagScore, Promotion
from gpt2core.run_folder import RunFolder
from gpt2core.shards import read_manifest
from gpt2core.storage import write_text

HUB_DATASET = re.compile(r"^[\w.-]+/[\w.-]+$")
HELLASWAG = "Rowan/hellaswag"


def write_card(
    folder: Path, decision: Promotion, evaluation: Evaluation, state: dict[str, Any], run: RunFolder
) -> None:
    """Writes README.md, and a picture of each curve that the run has up to the model's step."""
    config = RunConfig.model_validate(state["config"])
    pictures = _draw_curves(folder, run)
    source = _data_source(config)
    sections = [
        f"---\n{_front_matter(evaluation, source).to_yaml()}\n---",
        f"# {evaluation.run_name}, step {evaluation.step}",
        _what_it_is(config, state, source),
        "## Figures",
        _table(_figures(evaluation)),
        *(["## Curves", *(f"![{path.stem}]({path.name})" for path in pictures)] if pictures else []),
        "## Use",
        _USE,
        "## Where it comes from",
        _table(_origin(decision)),
        "`training_config.json` has every setting, `metrics.jsonl` the numbers behind the curves, `evaluation.json` the "
        "measurement and `promotion.json` the decision that promoted it.",
    ]
    write_text(folder / "README.md", "\n\n".join(sections) + "\n")


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
tokens = model.generate(**tokenizer("Hello, I'm a language model,", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(tokens[0]))
```

`.` is the folder of this file, or the model's name on the hub. The vocabulary is GPT-2's own 50,257 tokens: the padding
that training adds for speed is cut off."""


def _draw_curves(folder: Path, run: RunFolder) -> list[Path]:
    drawn = []
    for curve, number in ((curves.loss, "val_loss"), (curves.hellaswag, "acc_norm")):
        if any(number in line for line in run.metrics()):
            drawn.append(folder / f"{curve.__name__}.png")
            drawn[-1].write_bytes(curves.picture(curve, [run]))
    return drawn


def _front_matter(evaluation: Evaluation, source: str | None) -> ModelCardData:
    is_on_hub = source is not None and HUB_DATASET.match(source) and not Path(source).exists()
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=[source] if is_on_hub and source else None,
        model_name=evaluation.run_name,
        eval_results=[
            _result("validation shard", source or "tokens", "loss", evaluation.val_loss),
            _result("validation shard", source or "tokens", "perplexity", evaluation.perplexity),
            *(
                _result(f"HellaSwag ({score.convention})", HELLASWAG, metric, value)
                for score in _scores(evaluation)
                for metric, value in (("acc", score.acc), ("acc_norm", score.acc_norm))
            ),
        ],
    )


def _result(dataset_name: str, dataset_type: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        dataset_split="validation",
        metric_type=metric,
        metric_value=value,
    )


def _scores(evaluation: Evaluation) -> list[HellaSwagScore]:
    """The HellaSwag results, one a convention."""
    found = (evaluation.hellaswag, evaluation.hellaswag_lm_eval)
    return [score for score in found if score]


def _data_source(config: RunConfig) -> str | None:
    """What the training shards were made from, None when they do not say or cannot be reached."""
    with contextlib.suppress(ValueError, OSError):
        manifest = read_manifest(config.data.data_dir)
        return manifest.source if manifest else None
    return None


def _what_it_is(config: RunConfig, state: dict[str, Any], source: str | None) -> str:
    model, train = config.model, config.train
    shape = (
        f"A GPT-2 of {model.num_parameters():,} parameters in training ({model.num_layers} layers, {model.embd_size} wide, "
        f"{model.num_heads} heads, context {model.context_length})"
    )
    if "imported_from" in state:
        return f"{shape}, imported from {state['imported_from']}."
    start = f"the weights in {train.init_from}" if train.init_from else "scratch"
    return (
        f"{shape}, trained from {start} on {state.get('tokens_seen', 0):,} tokens of {source or 'token shards'} in steps of "
        f"{train.total_batch_size:,} tokens, learning rate {train.max_lr:g} to {train.min_lr:g} after {train.warmup_steps} "
        f"steps of warmup."
    )


def _figures(evaluation: Evaluation) -> list[tuple[str, str]]:
    stderr = evaluation.val_loss_stderr
    bits_per_byte = evaluation.bits_per_byte
    rows = [
        ("validation loss", f"{evaluation.val_loss:.4f}{'' if stderr is None else f' ± {stderr:.4f}'} nats a token"),
        ("perplexity", f"{evaluation.perplexity:.2f}"),
        *([] if bits_per_byte is None else [("bits per byte", f"{bits_per_byte:.4f}")]),
    ]
    for score in _scores(evaluation):
        name = f"HellaSwag ({score.convention}, {score.examples:,} examples)"
        rows.append((f"{name}, acc", f"{score.acc:.4f} ± {score.acc_stderr:.4f}"))
        rows.append((f"{name}, acc_norm", f"{score.acc_norm:.4f} ± {score.acc_norm_stderr:.4f}"))
    return rows


def _origin(decision: Promotion) -> list[tuple[str, str | None]]:
    found = decision.candidate
    return [
        ("run, checkpoint, step", f"{found.run_name}, {found.checkpoint}, {found.step}"),
        ("sha256 of the checkpoint", found.sha256),
        ("promoted by", f"{decision.rule}: {decision.reason}"),
        ("training data, fingerprint", decision.train_fingerprint),
        ("validation data, fingerprint", f"{found.val_fingerprint}, {found.val_tokens:,} tokens"),
        ("trained with", _code(decision.trained_with)),
        ("promoted with", _code(decision.promoted_with)),
        ("promoted at (UTC)", decision.decided_at),
    ]


def _code(code: CodeVersion | None) -> str | None:
    if code is None:
        return None
    commit = f", commit {code.commit}{' with local changes' if code.dirty else ''}" if code.commit else ""
    return f"gpt2-pipeline {code.version}{commit}"


def _table(rows: list[Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value or 'unknown'} |" for name, value in rows)])
