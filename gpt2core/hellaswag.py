"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

Two conventions, of which each report names its own:

    build-nanogpt  The text is ctx + " " + ending, with no activity label in front (karpathy/build-nanogpt, hellaswag.py).
                   acc:      the ending with the lowest summed loss over its tokens is right
                   acc_norm: the ending with the lowest mean loss over its tokens is right
    lm-eval        The activity label comes first, and WikiHow's markup is cleaned away (EleutherAI's
                   lm-evaluation-harness, task hellaswag).
                   acc:      as above
                   acc_norm: the ending with the lowest loss a character of it is right

GPT-2 124M as OpenAI released it scores acc 28.59%, acc_norm 29.55% by the first on the 10,042 validation examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2core.config import first_error
from gpt2core.distributed import Ranks
from gpt2core.model import GPT
from gpt2core.records import Convention, HellaSwagScore, pack
from gpt2core.shared_context import Row, ending_losses
from gpt2core.tokenizer import EOT, encoding

HUB_TIMEOUT_S = 10.0
ENDINGS = 4


def _label(value: object) -> object:
    """Raises ValueError for what Python or pydantic would take for a number, such as true, 1.0 and " 1"."""
    if type(value) is int or value in [str(number) for number in range(ENDINGS)]:
        return value
    raise ValueError(
        f"the number of the right ending, 0 to {ENDINGS - 1}, is needed, got {json.dumps(value, default=str)}"
    )


class Example(BaseModel):
    """One question: a context, four endings, and which of them is right."""

    model_config = ConfigDict(frozen=True)

    ctx: str = Field(pattern=r"\S")
    endings: list[Annotated[str, Field(min_length=1)]] = Field(min_length=ENDINGS, max_length=ENDINGS)
    label: Annotated[int, BeforeValidator(_label), Field(ge=0, lt=ENDINGS)]
    activity_label: str | None = None
    ctx_a: str | None = None
    ctx_b: str | None = None

    @property
    def has_parts(self) -> bool:
        """Whether lm-eval's convention, which puts the context together anew, can read it."""
        return None not in (self.activity_label, self.ctx_a, self.ctx_b)


def _stderr(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)


def is_file(source: str) -> bool:
    """Whether it is the path or URL of a file, and no dataset on the hub."""
    return source.endswith((".jsonl", ".json", ".jsonl.gz"))


def load_hellaswag(source: str) -> list[Example]:
    """Examples from a jsonl file at any fsspec URL, or from a dataset on the Hugging Face hub.

    Raises ValueError, naming the source and the line, when it cannot be had or an example is malformed.
    """
    rows = _jsonl_rows(source) if is_file(source) else _hub_rows(source)
    examples = []
    for where, row in rows:
        try:
            examples.append(Example.model_validate(row))
        except ValidationError as error:
            raise ValueError(f"HellaSwag {source}, {where}: {first_error(error)}") from None
    if not examples:
        raise ValueError(f"HellaSwag {source} holds no examples")
    return examples


def fingerprint(examples: list[Example]) -> str:
    """Tells these examples from others, wherever they came from."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(example.model_dump_json().encode() + b"\n")
    return hashed.hexdigest()


def _jsonl_rows(source: str) -> Iterator[tuple[str, Any]]:
    import fsspec

    try:
        with fsspec.open(source, "rt", encoding="utf-8", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"HellaSwag {source}, line {number}: not JSON ({error})") from None
    except (OSError, ImportError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"HellaSwag {source}: cannot be read ({error}); give the path or URL of a jsonl file"
        ) from None


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(source, timeout=HUB_TIMEOUT_S)  # answers at once where load_dataset would keep trying
        rows = datasets.load_dataset(source, split="validation")
    except Exception as error:  # the hub's client raises a dozen kinds, and each means the same to the user
        raise ValueError(
            f"HellaSwag {source} cannot be had from the Hugging Face hub ({type(error).__name__}); "
            f"check the network, or give --hellaswag the path or URL of a jsonl file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"example {number}", row


@dataclass(frozen=True)
class Questions:
    """The examples as a model of one context_length reads them by one convention; to be made once and asked often."""

    convention: Convention
    rows: list[Row]  # an example's four endings are numbered from 4 times its own number
    lengths: torch.Tensor  # (examples, 4), by which acc_norm divides an ending's loss
    labels: torch.Tensor  # (examples,)
    truncated: int

    @classmethod
    def of(cls, examples: list[Example], convention: Convention, context_length: int) -> Questions:
        """Raises ValueError for an example without what the convention needs."""
        joined = convention == "lm-eval"
        texts = (
            [_lm_eval_text(*one) for one in enumerate(examples, start=1)] if joined else [*map(_plain_text, examples)]
        )
        pairs = _encode_joined(texts) if joined else _encode_apart(texts)
        limit = context_length + 1 if joined else context_length  # tokens of a context and its ending
        rows: list[Row] = []
        truncated = 0
        for first in range(0, len(pairs), ENDINGS):
            of_example = pairs[first : first + ENDINGS]
            context = of_example[0][0]
            if all(other == context and len(context) + len(ending) <= limit for other, ending in of_example):
                rows.append(Row(context, [ending for _, ending in of_example], first))
                continue
            truncated += any(len(own) + len(ending) > limit for own, ending in of_example)
            rows += [_alone(*pair, limit, first + nth) for nth, pair in enumerate(of_example)]
        read = [ending for row in rows for ending in row.endings]
        lengths = [len(ending) for ending in (chain.from_iterable(of for _, of in texts) if joined else read)]
        labels = torch.tensor([example.label for example in examples])
        return cls(convention, rows, torch.tensor(lengths, dtype=torch.float64).view(-1, ENDINGS), labels, truncated)


def _alone(context: list[int], ending: list[int], limit: int, number: int) -> Row:
    """One ending with the end of its context, no more than `limit` tokens in all; a token at least is context."""
    tokens = (context + ending)[-limit:]
    start = max(1, len(tokens) - len(ending))
    return Row(tokens[:start], [tokens[start:]], number)


Text = tuple[str, list[str]]  # a context and its endings
Pairs = list[tuple[list[int], list[int]]]  # tokens of the context and the ending of each candidate


def _plain_text(example: Example) -> Text:
    return example.ctx, example.endings


def _lm_eval_text(number: int, example: Example) -> Text:
    if not example.has_parts:
        raise ValueError(
            f"HellaSwag by lm-eval's convention needs activity_label, ctx_a and ctx_b, which example {number} lacks: "
            f"give a file that has them, or --hellaswag_convention build-nanogpt"
        )
    context = f"{example.activity_label}: {example.ctx_a} {(example.ctx_b or '').capitalize()}"
    endings = [_clean(ending) for ending in example.endings]
    if "" in endings:
        raise ValueError(f"HellaSwag by lm-eval's convention: example {number} has an ending of nothing but markup")
    return _clean(context), endings


def _clean(text: str) -> str:
    """Without the markup that WikiHow's articles brought along."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _encode_apart(texts: list[Text]) -> Pairs:
    contexts = encoding().encode_ordinary_batch([context for context, _ in texts])
    endings = encoding().encode_ordinary_batch([f" {ending}" for _, endings in texts for ending in endings])
    return [(contexts[number // ENDINGS], ending) for number, ending in enumerate(endings)]


def _encode_joined(texts: list[Text]) -> Pairs:
    """As the harness does it: context and ending in one, and the ending is what comes after as many tokens as the context
    has alone; spaces at the context's end belong to the ending."""
    contexts = encoding().encode_ordinary_batch([context.rstrip() for context, _ in texts])
    whole = encoding().encode_ordinary_batch(
        [f"{context} {ending}" for context, endings in texts for ending in endings]
    )
    cuts = [len(contexts[number // ENDINGS]) for number in range(len(whole))]
    return [(tokens[:cut] or [EOT], tokens[cut:]) for tokens, cut in zip(whole, cuts, strict=True)]


def choices(model: GPT, questions: Questions, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The ending that the model chooses for each example, by summed loss and by acc_norm's, each (examples,).

    None when a loss is not finite.
    """
    summed = ending_losses(model, questions.rows, ranks).view(-1, ENDINGS)
    if not summed.isfinite().all():
        return None
    return summed.argmin(1), (summed / questions.lengths).argmin(1)


def evaluate_hellaswag(model: GPT, questions: Questions, ranks: Ranks) -> HellaSwagScore:
    """acc and acc_norm of the model, NaN when a loss is not finite; the ranks share the work, and all get the result."""
    chosen, count = choices(model, questions, ranks), len(questions.labels)
    is_right = [choice == questions.labels for choice in chosen] if chosen else None
    acc, acc_norm = (right.double().mean().item() for right in is_right) if is_right else (math.nan, math.nan)
    return HellaSwagScore(
        convention=questions.convention,
        examples=count,
        truncated=questions.truncated,
        acc=acc,
        acc_stderr=_stderr(acc, count),
        acc_norm=acc_norm,
        acc_norm_stderr=_stderr(acc_norm, count),
        right_by_acc_norm=pack(is_right[1].tolist()) if is_right else None,
    )
