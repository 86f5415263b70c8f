"""Text from a model: seeds, greedy choice, padding, and the model's room."""

from __future__ import annotations

import pytest
import torch

from gpt2core.config import PADDED_VOCAB_SIZE, VOCAB_SIZE, ModelConfig
from gpt2core.generate import generate
from gpt2core.model import GPT
from gpt2core.tokenizer import EOT, encoding

CONTEXT_LENGTH = 24
THE = 262  # " the"
PROMPT = "Once upon a time"  # 4 tokens


def random_model() -> GPT:
    model = GPT(ModelConfig(context_length=CONTEXT_LENGTH, num_layers=2, embd_size=32, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def model_that_wants(*tokens: int) -> GPT:
    """A model whose logits are highest for these tokens, whatever it read."""
    model = random_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(10.0)
        model.transformer.wte.weight[list(tokens)] = 1.0
    return model


def greedy_by_hand(model: GPT, prompt: str, count: int) -> str:
    tokens = encoding().encode_ordinary(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1, :VOCAB_SIZE]
        tokens.append(int(logits.argmax()))
    return encoding().decode(tokens)


def test_same_seed_same_text_other_seed_other_text() -> None:
    model = random_model()
    first = generate(model, PROMPT, seed=7, samples=2)
    assert generate(model, PROMPT, seed=7, samples=2) == first
    assert generate(model, PROMPT, seed=8, samples=2) != first
    assert first[0] != first[1]
    assert all(text.startswith(PROMPT) and len(text) > len(PROMPT) for text in first)


def test_the_global_generator_is_left_alone() -> None:
    """Samples made in the middle of training must not change what training draws."""
    model = random_model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, PROMPT)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    model = random_model()
    expected = greedy_by_hand(model, PROMPT, 8)
    assert generate(model, PROMPT, max_new_tokens=8, temperature=0, seed=1) == [expected]
    assert generate(model, PROMPT, max_new_tokens=8, temperature=0, seed=2) == [expected]


def test_top_k_one_is_greedy_at_any_temperature() -> None:
    model = random_model()
    assert generate(model, PROMPT, max_new_tokens=8, temperature=2.0, top_k=1) == [greedy_by_hand(model, PROMPT, 8)]


def test_top_k_draws_among_the_k_likeliest() -> None:
    wanted = [262, 257, 290]  # " the", " a", " and"
    texts = generate(model_that_wants(*wanted), PROMPT, top_k=3, max_new_tokens=8, samples=50)
    drawn = {token for text in texts for token in encoding().encode_ordinary(text.removeprefix(PROMPT))}
    assert drawn == set(wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_ids_are_never_drawn(temperature: float) -> None:
    model = model_that_wants(*range(VOCAB_SIZE, PADDED_VOCAB_SIZE))
    with torch.no_grad():
        assert int(model(torch.tensor([[1]]))[0, -1].argmax()) >= VOCAB_SIZE, "unmasked it would draw padding"
    for text in generate(model, PROMPT, temperature=temperature, top_k=50, samples=8):
        assert text.startswith(PROMPT)  # decoding a padding id would have raised


def test_stops_at_the_context_length_and_at_max_new_tokens() -> None:
    model = model_that_wants(THE)
    length = len(encoding().encode_ordinary(PROMPT))
    assert generate(model, PROMPT, max_new_tokens=1000, temperature=0) == [PROMPT + " the" * (CONTEXT_LENGTH - length)]
    assert generate(model, PROMPT, max_new_tokens=3, temperature=0) == [PROMPT + " the" * 3]


def test_end_of_text_ends_it_and_is_not_shown() -> None:
    assert generate(model_that_wants(EOT), PROMPT, temperature=0, samples=2) == [PROMPT, PROMPT]


def test_an_empty_prompt_starts_a_document() -> None:
    assert generate(model_that_wants(THE), "", max_new_tokens=2, temperature=0) == [" the the"]


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"prompt has {CONTEXT_LENGTH} tokens .* context_length is {CONTEXT_LENGTH}"):
        generate(random_model(), " the" * CONTEXT_LENGTH)
    assert len(generate(random_model(), " the" * (CONTEXT_LENGTH - 1))) == 1
