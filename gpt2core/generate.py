"""Text from a model, token by token, for one prompt or many at once."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2core.config import VOCAB_SIZE
from gpt2core.kv_cache import KeyValueCache
from gpt2core.model import GPT
from gpt2core.tokenizer import EOT, encoding

PROMPT = "Hello, I'm a language model,"
SAMPLE_PROMPTS = [PROMPT, "The capital of France is", "Photosynthesis is the process by which", "In 1969,"]  # of a run


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises ValueError for a number that makes no sense."""

    max_new_tokens: int = 32
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int | None = 50  # among so many likeliest tokens
    top_p: float = 1.0  # among the likeliest that together have this probability (Holtzman et al. 2020)
    seed: int = 42  # each prompt's own, so that its text does not depend on what else is in the batch
    samples: int = 1  # continuations of each prompt

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "top_k"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature {self.temperature}: 0, or a number from 0.001 to 1000 is needed")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: a number from 0 to 2^63 - 1 is needed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: a number above 0 and up to 1 is needed")


def generate(model: GPT, prompt: str = PROMPT, sampling: Sampling = Sampling()) -> list[str]:
    """`sampling.samples` continuations of the prompt, each with the prompt in front, up to <|endoftext|>.

    Raises ValueError for a prompt that leaves no room.
    """
    return generate_each(model, [prompt], sampling)[0]


def generate_each(model: GPT, prompts: list[str], sampling: Sampling) -> list[list[str]]:
    """The continuations of each prompt, all computed at once: the same texts as one prompt after the other."""
    rows = [_tokens(model, prompt) for prompt in prompts for _ in range(sampling.samples)]
    drawn = torch.cat(list(_draw(model, rows, sampling)), dim=1).tolist()  # (rows, T)
    texts = [encoding().decode(row[: row.index(EOT)] if EOT in row else row) for row in drawn]
    each = iter(texts)
    return [[prompt + next(each) for _ in range(sampling.samples)] for prompt in prompts]


def samples(model: GPT) -> list[str]:
    """One text of each of SAMPLE_PROMPTS, with the same seed each time; of those that the context leaves room for."""
    room = model.config.context_length
    prompts = [prompt for prompt in SAMPLE_PROMPTS if len(encoding().encode_ordinary(prompt)) < room]
    return [texts[0] for texts in generate_each(model, prompts, Sampling())] if prompts else []


def stream(model: GPT, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The first continuation piece by piece as it is drawn, without the prompt; only whole characters.

    Raises ValueError for a prompt that leaves no room.
    """
    return _pieces(_draw(model, [_tokens(model, prompt)], sampling))


def _pieces(drawn: Iterator[Tensor]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for tokens in drawn:
        if (token := int(tokens[0])) == EOT:
            break
        yield decoder.decode(encoding().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def _tokens(model: GPT, prompt: str) -> list[int]:
    tokens = encoding().encode_ordinary(prompt) or [EOT]
    if len(tokens) >= model.config.context_length:
        raise ValueError(
            f"the prompt {_beginning(prompt)!r} has {len(tokens)} tokens and the model's context_length is "
            f"{model.config.context_length}: at most {model.config.context_length - 1} leave room for an answer"
        )
    return tokens


def check_prompts(model: GPT, prompts: list[str]) -> None:
    """Raises ValueError for the first prompt that leaves no room."""
    for prompt in prompts:
        _tokens(model, prompt)


def _beginning(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]} ..."


@torch.no_grad()
def _draw(model: GPT, rows: list[list[int]], sampling: Sampling) -> Iterator[Tensor]:
    """The next token of each row, (rows, 1), time after time until all have ended. A row that has ended gives EOT."""
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    tokens = torch.tensor([[EOT] * (longest - len(row)) + row for row in rows], device=device)  # (rows, T)
    room = torch.tensor([model.config.context_length - len(row) for row in rows], device=device)
    most = min(sampling.max_new_tokens, int(room.max()))
    cache = KeyValueCache(model.config, padding, longest + most, model.compute_dtype)
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in range(len(rows) // sampling.samples)]
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for count in range(1, most + 1):
        logits = model.lm_head(model.hidden(tokens, cache)[:, -1]).float()[:, :VOCAB_SIZE]  # padding is never drawn
        if count == 1 and not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are damaged, or its training has diverged")
        tokens = _choose(logits, sampling, generators).masked_fill(done[:, None], EOT)
        yield tokens
        done |= (tokens[:, 0] == EOT) | (room == count)
        if done.all():
            break


def _choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token a row, (rows, 1), of logits (rows, V); each generator draws for its prompt's rows."""
    if sampling.temperature == 0:
        return logits.argmax(1, keepdim=True)
    if sampling.top_k is not None:
        lowest_kept = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest_kept, float("-inf"))
    probabilities = (logits / sampling.temperature).softmax(1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    groups = zip(probabilities.split(sampling.samples), generators, strict=True)
    return torch.cat([torch.multinomial(group, 1, generator=generator) for group, generator in groups])


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Without what comes after the likeliest tokens that together reach `top_p`; the likeliest one always stays."""
    ordered, numbers = probabilities.sort(1, descending=True)
    is_past = ordered.cumsum(1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(1, numbers, ordered.masked_fill(is_past, 0.0))
