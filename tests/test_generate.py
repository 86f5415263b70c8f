"""Text from a model: seeds, greedy choice, padding, and the model's room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2core.config import PADDED_VOCAB_SIZE, VOCAB_SIZE, ModelConfig
from gpt2core.generate import Sampling, generate, generate_each, stream
from gpt2core.kv_cache import KeyValueCache
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
    first = generate(model, PROMPT, Sampling(seed=7, samples=2))
    assert generate(model, PROMPT, Sampling(seed=7, samples=2)) == first
    assert generate(model, PROMPT, Sampling(seed=8, samples=2)) != first
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
    assert generate(model, PROMPT, Sampling(max_new_tokens=8, temperature=0, seed=1)) == [expected]
    assert generate(model, PROMPT, Sampling(max_new_tokens=8, temperature=0, seed=2)) == [expected]


def test_top_k_one_is_greedy_at_any_temperature() -> None:
    model = random_model()
    assert generate(model, PROMPT, Sampling(max_new_tokens=8, temperature=2.0, top_k=1)) == [
        greedy_by_hand(model, PROMPT, 8)
    ]


def test_top_k_draws_among_the_k_likeliest() -> None:
    wanted = [262, 257, 290]  # " the", " a", " and"
    texts = generate(model_that_wants(*wanted), PROMPT, Sampling(top_k=3, max_new_tokens=8, samples=50))
    drawn = {token for text in texts for token in encoding().encode_ordinary(text.removeprefix(PROMPT))}
    assert drawn == set(wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_ids_are_never_drawn(temperature: float) -> None:
    model = model_that_wants(*range(VOCAB_SIZE, PADDED_VOCAB_SIZE))
    with torch.no_grad():
        assert int(model(torch.tensor([[1]]))[0, -1].argmax()) >= VOCAB_SIZE, "unmasked it would draw padding"
    for text in generate(model, PROMPT, Sampling(temperature=temperature, top_k=50, samples=8)):
        assert text.startswith(PROMPT)  # decoding a padding id would have raised


def test_stops_at_the_context_length_and_at_max_new_tokens() -> None:
    model = model_that_wants(THE)
    length = len(encoding().encode_ordinary(PROMPT))
    assert generate(model, PROMPT, Sampling(max_new_tokens=1000, temperature=0)) == [
        PROMPT + " the" * (CONTEXT_LENGTH - length)
    ]
    assert generate(model, PROMPT, Sampling(max_new_tokens=3, temperature=0)) == [PROMPT + " the" * 3]


def test_end_of_text_ends_it_and_is_not_shown() -> None:
    assert generate(model_that_wants(EOT), PROMPT, Sampling(temperature=0, samples=2)) == [PROMPT, PROMPT]


def test_an_empty_prompt_starts_a_document() -> None:
    assert generate(model_that_wants(THE), "", Sampling(max_new_tokens=2, temperature=0)) == [" the the"]


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=rf"prompt ' the the the the the \.\.\.' has {CONTEXT_LENGTH} tokens .* context_length is {CONTEXT_LENGTH}: at most 23",
    ):
        generate(random_model(), " the" * CONTEXT_LENGTH)
    assert len(generate(random_model(), " the" * (CONTEXT_LENGTH - 1))) == 1


# --- the cache -------------------------------------------------------------------------------------------------------


def test_with_a_cache_the_logits_are_those_of_the_whole_text() -> None:
    model = random_model()
    tokens = torch.randint(0, VOCAB_SIZE, (2, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(model.config, torch.zeros(2, dtype=torch.int64), CONTEXT_LENGTH, torch.float32)
    with torch.no_grad():
        pieces = [model.hidden(piece, cache) for piece in tokens.split([5, 1, 1, 7, 10], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(tokens), rtol=1e-5, atol=1e-5)


PROMPTS = ["Once upon a time", "", "The", "It was the best of times, it was the worst of times, it"]


@pytest.mark.parametrize("sampling", [Sampling(12, temperature=0), Sampling(12, samples=3), Sampling(12, top_p=0.7)])
def test_a_batch_gives_each_prompt_the_text_it_has_alone(sampling: Sampling) -> None:
    model = random_model()
    assert generate_each(model, PROMPTS, sampling) == [generate(model, prompt, sampling) for prompt in PROMPTS]


def test_a_short_prompt_beside_a_long_one_keeps_all_its_room() -> None:
    long = " the" * (CONTEXT_LENGTH - 1)
    model, sampling = model_that_wants(THE), Sampling(1000, temperature=0)
    assert generate_each(model, [long, PROMPT], sampling) == [[long + " the"], generate(model, PROMPT, sampling)]


def test_what_is_streamed_is_the_text() -> None:
    model = random_model()
    for seed in range(5):
        sampling = Sampling(16, seed=seed)
        pieces = list(stream(model, PROMPT, sampling))
        assert [PROMPT + "".join(pieces)] == generate(model, PROMPT, sampling)
        assert len(pieces) > 5


def test_a_character_of_several_tokens_is_streamed_whole() -> None:
    earth = encoding().encode_ordinary("\U0001f30d")
    assert len(earth) > 1

    class Reciting(GPT):
        """Wants one token of the character after the other."""

        def hidden(self, tokens: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
            assert cache
            said = max(0, cache.length - len(encoding().encode_ordinary(PROMPT)) + 1)
            cache.length += tokens.shape[1]
            want = torch.zeros(*tokens.shape, self.config.embd_size)
            want[..., said] = 1.0
            return want

    model = Reciting(ModelConfig(context_length=CONTEXT_LENGTH, num_layers=1, embd_size=32, num_heads=2))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        for place, token in enumerate(earth):
            model.transformer.wte.weight[token, place] = 1.0
    sampling = Sampling(len(earth), temperature=0)
    assert "".join(stream(model, PROMPT, sampling)) == "\U0001f30d"
    assert list(stream(model, PROMPT, sampling))[: len(earth) - 1] == [""] * (len(earth) - 1)


def test_top_p_draws_among_the_likeliest_that_reach_it() -> None:
    model = model_that_wants(262, 257)
    texts = generate(model, PROMPT, Sampling(8, top_k=None, top_p=0.5, samples=50))
    drawn = {token for text in texts for token in encoding().encode_ordinary(text.removeprefix(PROMPT))}
    assert drawn <= {262, 257}
    model = random_model()
    assert generate(model, PROMPT, Sampling(8, top_p=1e-6)) == generate(model, PROMPT, Sampling(8, temperature=0))
    with pytest.raises(ValueError, match=r"top_p 1\.5: a number above 0 and up to 1 is needed"):
        Sampling(top_p=1.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"temperature": 1e-40}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"seed": -1}, "seed")],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**wrong)


def test_a_model_of_nan_writes_nothing() -> None:
    model = random_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            generate(model, PROMPT, Sampling(temperature=temperature))
