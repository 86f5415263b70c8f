"""The model is GPT-2: the same logits and loss as Hugging Face's, from the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.config import ModelConfig
from gpt2core.export import huggingface_state_dict
from gpt2core.model import GPT

SHAPE = ModelConfig(context_length=24, num_layers=3, embd_size=48, num_heads=4, vocab_size=50257)


def make_gpt(config: ModelConfig = SHAPE, seed: int = 0) -> GPT:
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def stir(model: GPT) -> GPT:
    """Random biases and LayerNorms as well, so that none of them can be left out or swapped unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def make_huggingface(model: GPT) -> GPT2LMHeadModel:
    config = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50257,
            n_positions=config.context_length,
            n_embd=config.embd_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    missing, unexpected = theirs.load_state_dict(huggingface_state_dict(model.state_dict()), strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.eval()


def some_tokens(batch: int, length: int, vocabulary: int = 50257) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_logits_and_loss_are_those_of_hugging_face():
    ours = stir(make_gpt())
    theirs = make_huggingface(ours)
    tokens = some_tokens(3, 24)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.3  # logits worth comparing
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_of_the_vocabulary_leaves_the_real_logits_alone():
    padded = stir(make_gpt(SHAPE.model_copy(update={"vocab_size": 50304})))
    tokens = some_tokens(2, 10)
    logits = padded(tokens)
    assert logits.shape == (2, 10, 50304)
    torch.testing.assert_close(logits[..., :50257], make_huggingface(padded)(tokens).logits, atol=1e-4, rtol=0)


def test_the_weights_are_drawn_by_init_weights_alone():
    before = torch.get_rng_state()
    model = GPT(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gradients_are_those_of_hugging_face():
    ours = stir(make_gpt())
    theirs = make_huggingface(ours)
    tokens = some_tokens(2, 24)
    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    theirs(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    mine = huggingface_state_dict({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_head_is_the_token_embedding():
    model = make_gpt()
    assert model.lm_head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    state = {name: tensor.clone() for name, tensor in stir(model).state_dict().items()}
    again = GPT(SHAPE)
    again.load_state_dict(state)
    assert again.lm_head.weight is again.transformer.wte.weight


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits():
    model = stir(make_gpt())
    tokens = some_tokens(2, 20)
    before = model(tokens)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50257
    after = model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12], atol=1e-6, rtol=0)
    assert (after[:, 12:] - before[:, 12:]).abs().amax(dim=(0, 2)).min() > 1e-3  # every later one sees it


@torch.no_grad()
def test_the_place_of_a_token_matters():
    logits = stir(make_gpt())(torch.full((1, 8), 7))
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-2


def test_more_tokens_than_the_context_are_refused():
    model = make_gpt()
    assert model(some_tokens(1, 24)).shape == (1, 24, 50257)
    with pytest.raises(ValueError, match="25 tokens are more than the model's context_length 24"):
        model(some_tokens(1, 25))


@torch.no_grad()
def test_losses_token_by_token_average_to_the_mean():
    model = stir(make_gpt())
    tokens, targets = some_tokens(3, 16), some_tokens(3, 16).flip(0)
    each = model(tokens, targets, reduction="none")
    assert each.shape == (3, 16)
    torch.testing.assert_close(each.mean(), model(tokens, targets))
    probabilities = model(tokens).softmax(-1)
    by_hand = -probabilities.gather(-1, targets[..., None])[..., 0].log()
    torch.testing.assert_close(each, by_hand, atol=1e-4, rtol=0)


def test_fresh_weights_have_gpt2s_spread():
    config = ModelConfig(context_length=512, num_layers=8, embd_size=128, num_heads=4)
    model = make_gpt(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert torch.all(parameter == 1), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    with torch.no_grad():
        tokens = some_tokens(2, 64)
        assert model(tokens, tokens.flip(0)).item() == pytest.approx(math.log(50304), abs=0.2)  # about 10.8


def test_the_weights_depend_on_the_seed_alone():
    first, same, other = (make_gpt(seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


@torch.no_grad()
def test_bf16_activations_stay_near_fp32_and_the_loss_is_fp32():
    exact = stir(make_gpt())
    rounded = GPT(SHAPE, compute_dtype=torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    tokens, targets = some_tokens(2, 24), some_tokens(2, 24).flip(0)
    assert rounded.hidden(tokens).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    loss = rounded(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(tokens, targets).item(), rel=5e-3)
    assert loss.item() != exact(tokens, targets).item()


@torch.no_grad()
def test_weights_cast_once_give_the_numbers_of_weights_cast_at_each_use():
    padded = SHAPE.model_copy(update={"vocab_size": 50304})
    cast, kept = GPT(padded, torch.bfloat16), GPT(padded, torch.bfloat16)
    fp32 = stir(make_gpt(padded))
    for model in (cast, kept):
        model.load_state_dict(fp32.state_dict())
    cast.cast_weights()
    tokens = some_tokens(2, 24)
    assert torch.equal(cast(tokens), kept(tokens))
    assert torch.equal(cast(tokens, tokens, reduction="none"), kept(tokens, tokens, reduction="none"))
    assert {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float32} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    fp32.cast_weights()
    assert fp32.lm_head.weight is fp32.transformer.wte.weight, "in fp32 there is nothing to cast"
