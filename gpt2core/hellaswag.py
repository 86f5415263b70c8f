"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

Convention, the one of karpathy/build-nanogpt: the text is ctx + " " + ending, with no activity label in front.

    acc       the ending with the lowest summed loss over its tokens is right
    acc_norm  the ending with the lowest mean loss over its tokens is right

GPT-2 124M as OpenAI released it scores acc 28.59%, acc_norm 29.55% by it on the 10,042 validation examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gpt2core import heartbeat
from gpt2core.config import first_error
from gpt2core.distributed import Ranks
from gpt2core.model import GPT
from gpt2core.terminal import track
from gpt2core.tokenizer import encoding

HUB_TIMEOUT_S = 10.0
TOKENS_PER_BATCH = 16_384


class Example(BaseModel):
    """One question: a context, four endings, and which of them is right."""

    model_config = ConfigDict(frozen=True)

    ctx: str = Field(min_length=1)
    endings: list[str] = Field(min_length=4, max_length=4)
    label: int = Field(ge=0, le=3)


@dataclass(frozen=True)
class HellaSwagResult:
    examples: int
    acc: float
    acc_norm: float

    @property
    def acc_stderr(self) -> float:
        return _stderr(self.acc, self.examples)

    @property
    def acc_norm_stderr(self) -> float:
        return _stderr(self.acc_norm, self.examples)


def _stderr(share: float, count: int) -> float:
    """Standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)


def load_hellaswag(source: str) -> list[Example]:
    """Examples from a jsonl file at any fsspec URL, or from a dataset on the Hugging Face hub.

    Raises ValueError, naming the source and the line, when it cannot be had or an example is malformed.
    """
    rows = _jsonl_rows(source) if source.endswith((".jsonl", ".json", ".jsonl.gz")) else _hub_rows(source)
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(Example.model_validate(row))
        except ValidationError as error:
            raise ValueError(f"HellaSwag {source}, example {number}: {first_error(error)}") from None
    if not examples:
        raise ValueError(f"HellaSwag {source} holds no examples")
    return examples


def _jsonl_rows(source: str) -> Iterator[Any]:
    import fsspec

    try:
        with fsspec.open(source, "rt", encoding="utf-8", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"HellaSwag {source}, example {number}: not JSON ({error})") from None
    except (OSError, ImportError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"HellaSwag {source}: cannot be read ({error}); give the path or URL of a jsonl file"
        ) from None


def _hub_rows(source: str) -> Iterable[Any]:
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(source, timeout=HUB_TIMEOUT_S)  # answers at once where load_dataset would keep trying
        return datasets.load_dataset(source, split="validation")
    except Exception as error:  # the hub's client raises a dozen kinds, and each means the same to the user
        raise ValueError(
            f"HellaSwag {source} cannot be had from the Hugging Face hub ({type(error).__name__}); "
            f"check the network, or give --hellaswag the path or URL of a jsonl file"
        ) from None


@dataclass(frozen=True)
class _Candidate:
    """One context with one ending: `tokens` and the number of them, at the end, that belong to the ending."""

    tokens: list[int]
    ending_length: int


def _candidates(examples: list[Example], context_length: int) -> list[_Candidate]:
    """Four candidates an example; a context too long for the model loses its beginning."""
    encode = encoding().encode_ordinary
    found = []
    for example in examples:
        context = encode(example.ctx)
        for ending in example.endings:
            tail = encode(" " + ending)
            tokens = (context + tail)[-context_length:]
            found.append(_Candidate(tokens, min(len(tail), len(tokens) - 1)))
    return found


@torch.no_grad()
def evaluate_hellaswag(model: GPT, examples: list[Example], ranks: Ranks) -> HellaSwagResult:
    """acc and acc_norm of the model; the ranks share the candidates, and all of them get the result."""
    candidates = _candidates(examples, model.config.context_length)
    losses = torch.zeros(2, len(candidates), dtype=torch.float64)  # summed and mean loss of each candidate
    longest_first = sorted(range(len(candidates)), key=lambda i: -len(candidates[i].tokens))
    # The batches are the same for any number of ranks, and so is each candidate's loss.
    own = list(_batches(longest_first, candidates))[ranks.rank :: ranks.world_size]
    for batch in track(own, "HellaSwag, batches"):
        losses[:, batch] = _ending_losses(model, [candidates[i] for i in batch], ranks.device).double().cpu()
        heartbeat.beat()
    summed, mean = ranks.sum(losses).view(2, len(examples), 4)
    labels = torch.tensor([example.label for example in examples])
    return HellaSwagResult(
        examples=len(examples),
        acc=(summed.argmin(1) == labels).double().mean().item(),
        acc_norm=(mean.argmin(1) == labels).double().mean().item(),
    )


def _batches(longest_first: list[int], candidates: list[_Candidate]) -> Iterator[list[int]]:
    """Neighbours in length go together, so that little of a batch is padding."""
    batch: list[int] = []
    for i in longest_first:
        if batch and len(candidates[batch[0]].tokens) * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _ending_losses(model: GPT, batch: list[_Candidate], device: torch.device) -> Tensor:
    """Summed and mean loss over each candidate's ending, (2, len(batch))."""
    longest = max(len(candidate.tokens) for candidate in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    is_ending = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, candidate in enumerate(batch):
        end = len(candidate.tokens)
        tokens[row, :end] = torch.tensor(candidate.tokens)
        is_ending[row, end - candidate.ending_length : end] = True
    tokens, is_ending = tokens.to(device), is_ending.to(device)
    foretells = is_ending.roll(-1, dims=1)  # position t foretells token t + 1; no ending begins at token 0
    logits = model.lm_head(model.hidden(tokens)[foretells])  # (ending tokens of the whole batch, V)
    losses = torch.zeros(tokens.shape, device=device)
    losses[is_ending] = F.cross_entropy(logits.float(), tokens[is_ending], reduction="none")
    summed = losses.sum(1)
    return torch.stack([summed, summed / is_ending.sum(1)])
