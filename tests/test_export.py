"""An exported folder is one that Hugging Face transformers loads as it is, with no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2core.config import ModelConfig
from gpt2core.export import export_huggingface, huggingface_state_dict
from gpt2core.model import GPT
from gpt2core.tokenizer import encoding

SHAKESPEARE = Path(__file__).parents[1] / "data" / "sample" / "tinyshakespeare.txt"
SHAPE = ModelConfig(context_length=32, num_layers=2, embd_size=32, num_heads=4)


@pytest.fixture(scope="module")
def model():
    model = GPT(SHAPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "folder"
    export_huggingface(model.state_dict(), SHAPE, folder, "model")
    return folder


def test_weights_that_are_not_finite_are_not_exported(model, tmp_path):
    weights = dict(model.state_dict())
    weights["transformer.ln_f.bias"] = torch.full((32,), torch.nan)
    with pytest.raises(ValueError, match=r"^epoch_00003: transformer\.ln_f\.bias has 32 of 32 values that are NaN"):
        export_huggingface(weights, SHAPE, tmp_path / "exported", "epoch_00003")
    assert not (tmp_path / "exported").exists()


@torch.no_grad()
def test_transformers_gives_the_same_logits(model, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    tokens = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = theirs.eval()(tokens).logits
    assert logits.shape == (2, 32, 50257)
    torch.testing.assert_close(logits, model(tokens)[..., :50257], atol=1e-4, rtol=0)
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert parameters == SHAPE.num_parameters() - 47 * 32  # without the 47 rows of padding


def test_dropout_is_off_in_training_mode_too(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).train()
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(theirs(tokens).logits, theirs(tokens).logits, atol=0, rtol=0)


@torch.no_grad()
def test_transformers_continues_a_text(folder, model):
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    prompt = torch.tensor([encoding().encode_ordinary("To be, or not")])
    continued = theirs.generate(prompt, max_new_tokens=5, do_sample=False)[0].tolist()
    tokens = prompt[0].tolist()
    for _ in range(len(continued) - len(tokens)):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, :50257].argmax()))
    assert continued == tokens


def test_the_tokenizer_gives_the_same_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == tokenizer.vocab_size == 50257
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert tokenizer.model_max_length == 32
    texts = [
        SHAKESPEARE.read_text(encoding="utf-8")[:30_000],
        "I'll say it's 12,345.67 — naïve “café” 🙂👩‍👩‍👧 日本語 Привет",
        "  two  spaces\t\ttabs\n\n\nlines \r\n end   ",
        "def f(x):\n    return x**2  # code\n",
        " don't , stop . spaces ' before",
    ]
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert ids == encoding().encode_ordinary(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256]


def test_the_configuration_says_gpt2_with_its_own_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert (config["vocab_size"], config["n_positions"]) == (50257, 32)
    assert (config["n_embd"], config["n_layer"], config["n_head"]) == (32, 2, 4)
    assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == 50257


def test_the_weights_are_cut_and_turned_and_the_head_left_out(model):
    weights = huggingface_state_dict(model.state_dict())
    assert "lm_head.weight" not in weights
    assert weights["transformer.wte.weight"].shape == (50257, 32)
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert weights["transformer.h.1.mlp.c_proj.weight"].shape == (128, 32)
    assert all(tensor.is_contiguous() for tensor in weights.values())
    assert model.state_dict()["transformer.wte.weight"].shape == (50304, 32)
