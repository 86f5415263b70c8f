"""A model as Hugging Face transformers loads it: model.safetensors, config.json and the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2core.config import VOCAB_SIZE, ModelConfig
from gpt2core.storage import write_json, write_text
from gpt2core.tokenizer import EOT, encoder_json, vocab_bpe

# GPT-2's released code multiplies from the left, so Hugging Face keeps these four matrices transposed (its Conv1D).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def huggingface_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT2LMHeadModel's weights: the vocabulary's padding cut off, the tied head left to the embedding."""
    weights = {}
    for name, tensor in state_dict.items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[:VOCAB_SIZE]
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    return weights


def import_huggingface(folder: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights and shape in a folder of transformers' GPT2LMHeadModel, the vocabulary padded again.

    The padding's rows are zero: their logits are 0, and they are never drawn. Raises ValueError when it is no GPT-2.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "gpt2" or config.get("vocab_size") != VOCAB_SIZE:
        raise ValueError(f"{folder / 'config.json'} is not of a GPT-2 with the vocabulary of {VOCAB_SIZE} tokens")
    model = ModelConfig(
        context_length=config["n_positions"],
        num_layers=config["n_layer"],
        embd_size=config["n_embd"],
        num_heads=config["n_head"],
    )
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(".attn.bias"):  # the causal mask, which older files carry
            continue
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    embedding = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = F.pad(embedding, (0, 0, 0, model.vocab_size - VOCAB_SIZE))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights, model


def export_huggingface(state_dict: dict[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(huggingface_state_dict(state_dict), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "vocab_size": VOCAB_SIZE,
            "n_positions": model.context_length,
            "n_embd": model.embd_size,
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": EOT,
            "eos_token_id": EOT,
            "tie_word_embeddings": True,
        },
    )
    write_json(folder / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": EOT})
    write_text(folder / "vocab.json", encoder_json())
    write_text(folder / "merges.txt", vocab_bpe())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.context_length,
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
    )
