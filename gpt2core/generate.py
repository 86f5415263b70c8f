"""Text from a model, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2core.config import VOCAB_SIZE
from gpt2core.model import GPT
from gpt2core.tokenizer import EOT, encoding

PROMPT = "Hello, I'm a language model,"


@torch.no_grad()
def generate(
    model: GPT,
    prompt: str = PROMPT,
    *,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 42,
    samples: int = 1,
) -> list[str]:
    """Continuations of the prompt, each with the prompt in front, up to <|endoftext|> or `max_new_tokens`.

    temperature 0 takes the likeliest token each time. Raises ValueError for a prompt that leaves no room, or a number
    that makes no sense.
    """
    for name, value, least in [
        ("max_new_tokens", max_new_tokens, 1),
        ("samples", samples, 1),
        ("top_k", top_k or 1, 1),
    ]:
        if value < least:
            raise ValueError(f"{name} {value}: at least {least} is needed")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature}: a number from 0 up is needed")
    device = next(model.parameters()).device
    ids = encoding().encode_ordinary(prompt) or [EOT]
    room = model.config.context_length - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the model's context_length is {model.config.context_length}"
        )
    rng = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([ids] * samples, device=device)  # (samples, T)
    done = torch.zeros(samples, dtype=torch.bool, device=device)
    for _ in range(min(max_new_tokens, room)):
        logits = model.lm_head(model.hidden(tokens)[:, -1]).float()[:, :VOCAB_SIZE]  # padding is never drawn
        chosen = _choose(logits, temperature, top_k, rng).masked_fill(done[:, None], EOT)
        tokens = torch.cat([tokens, chosen], dim=1)
        done |= chosen[:, 0] == EOT
        if done.all():
            break
    return [prompt + _text(row[len(ids) :]) for row in tokens.tolist()]


def _choose(logits: Tensor, temperature: float, top_k: int | None, rng: torch.Generator) -> Tensor:
    """One token a row, (samples, 1)."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    if top_k is not None:
        lowest_kept = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest_kept, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=rng)


def _text(generated: list[int]) -> str:
    end = generated.index(EOT) if EOT in generated else len(generated)
    return encoding().decode(generated[:end])
