"""A model as Hugging Face transformers loads it: model.safetensors, config.json and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from gpt2core.config import VOCAB_SIZE, ModelConfig
from gpt2core.storage import publish, write_json, write_text
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


def check_finite(weights: Mapping[str, Tensor], where: object) -> None:
    """Raises ValueError, naming `where` and the tensor, for weights with NaN or infinity in them."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            count = tensor.numel() - int(tensor.isfinite().sum())
            raise ValueError(
                f"{where}: {name} has {count:,} of {tensor.numel():,} values that are NaN or infinite: "
                f"the file is damaged, or the training diverged; take an earlier checkpoint"
            )


def export_huggingface(state_dict: dict[str, Tensor], model: ModelConfig, folder: Path, origin: object) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    Raises ValueError, naming the `origin` of the weights, when they are not all finite.
    """
    weights = huggingface_state_dict(state_dict)
    check_finite(weights, origin)
    folder.mkdir(parents=True, exist_ok=True)
    with publish(folder / "model.safetensors") as file:  # save_file's is for its owner's eyes alone
        file.write(save(weights, metadata={"format": "pt"}))
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
