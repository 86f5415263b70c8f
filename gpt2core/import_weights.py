"""GPT-2 weights that others wrote: Hugging Face transformers' folders and llm.c's .bin checkpoints, local or at a URL.

They keep GPT-2's own 50,257 tokens. Rows of padding would have logits of zero, and OpenAI's weights give real tokens
logits far below that: the padding would take all probability.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from gpt2core import lock
from gpt2core.checkpoint import save_alone
from gpt2core.checkpoint_folder import BEST, FORMAT, Checkpoint, CheckpointFolder
from gpt2core.config import VOCAB_SIZE, ModelConfig, RunConfig, TrainConfig, first_error
from gpt2core.export import TRANSPOSED, check_finite, huggingface_state_dict
from gpt2core.model import GPT
from gpt2core.run_folder import RunFolder
from gpt2core.storage import Location, file_sizes, first_line, is_remote, join, local_path, read_bytes, read_text, size

Weights = dict[str, Tensor]

# What this project computes, with what transformers takes where config.json is silent (GPT2Config).
COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# llm.c, train_gpt2.py, write_model(): 256 int32, then each tensor over all layers, matrices as (out, in).
LLMC_HEADER_BYTES, LLMC_MAGIC = 1024, 20240326
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
LLMC_ORDER = [
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.{}.ln_1.weight",
    "transformer.h.{}.ln_1.bias",
    "transformer.h.{}.attn.c_attn.weight",
    "transformer.h.{}.attn.c_attn.bias",
    "transformer.h.{}.attn.c_proj.weight",
    "transformer.h.{}.attn.c_proj.bias",
    "transformer.h.{}.ln_2.weight",
    "transformer.h.{}.ln_2.bias",
    "transformer.h.{}.mlp.c_fc.weight",
    "transformer.h.{}.mlp.c_fc.bias",
    "transformer.h.{}.mlp.c_proj.weight",
    "transformer.h.{}.mlp.c_proj.bias",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
]


def import_run(kind: str, location: str, artifacts_dir: str, run_name: str) -> Checkpoint:
    """Makes a run of its own from foreign weights: config.json, and best_model.pt with no optimizer state.

    Raises ValueError when they cannot be read, or the run folder holds checkpoints already.
    """
    if kind not in READERS:
        raise ValueError(f"--from {kind}: the formats known are {' and '.join(READERS)}")
    folder = RunFolder(artifacts_dir, run_name)
    _check_free(folder)
    weights, model = READERS[kind](location)
    config = config_of(model, run_name, artifacts_dir)
    state = {
        "format": FORMAT,
        "step": 0,
        "epoch": 0,
        "config": config.model_dump(mode="json"),
        "model": weights,
        "imported_from": f"{kind} {location}",
    }
    with lock.hold(folder.path / lock.LOCK_FILE):
        _check_free(folder)  # somebody may have been quicker
        folder.claim(config)
        return save_alone(CheckpointFolder(folder.checkpoints), state, BEST)


def _check_free(folder: RunFolder) -> None:
    if CheckpointFolder(folder.checkpoints).names():
        raise ValueError(f"{folder.path} already holds checkpoints: give another --run_name")


def config_of(model: ModelConfig, run_name: str = "imported", artifacts_dir: str = "artifacts") -> RunConfig:
    """A configuration for weights of which nothing is known but their shape."""
    train = TrainConfig(total_batch_size=512 * model.context_length)  # must be a multiple
    return RunConfig(run_name=run_name, artifacts_dir=artifacts_dir, model=model, train=train)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def read_huggingface(folder: Location) -> tuple[Weights, ModelConfig]:
    """The weights and shape in a folder of transformers' GPT2LMHeadModel, such as OpenAI's.

    Raises ValueError when it is no GPT-2, not a whole one, or one with NaN or infinity in it.
    """
    model, tensors = _huggingface_shape(folder), _read_tensors(folder)
    check_finite(tensors, folder)
    return from_huggingface(tensors, model, str(folder)), model


def from_huggingface(tensors: Mapping[str, Tensor], model: ModelConfig, where: str) -> Weights:
    """GPT2LMHeadModel's tensors under our names, fp32, matrices as (out, in).

    Raises ValueError, naming `where` and the tensor, when one is missing, foreign or of another shape.
    """
    named = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask, which older files carry
    }
    head = named.pop("lm_head.weight", None)
    _check(named, huggingface_state_dict(_shapes(model)), where)
    if head is not None and not torch.equal(head, named["transformer.wte.weight"]):
        raise ValueError(f"{where}: lm_head.weight is not the token embedding, to which GPT-2's head is tied")
    weights = {
        name: (tensor.t() if name.endswith(TRANSPOSED) else tensor).float().contiguous()
        for name, tensor in named.items()
    }
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def _huggingface_shape(folder: Location) -> ModelConfig:
    location = join(folder, "config.json")
    try:
        config = json.loads(read_text(location))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} holds no config.json: give a folder as transformers' save_pretrained has it"
        ) from None
    except ValueError as error:  # of remote storage, or not JSON
        raise ValueError(f"{location} cannot be read ({first_line(error)})") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{location} is not of a GPT-2: model_type is {kind!r}, and 'gpt2' is needed")
    if config.get("vocab_size") != VOCAB_SIZE:
        raise ValueError(
            f"{location}: vocab_size is {config.get('vocab_size')}, and GPT-2's vocabulary has {VOCAB_SIZE} tokens"
        )
    for name, values in COMPUTED.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{location}: {name} is {config[name]!r}, and only {values[0]!r} is computed here")
    if config.get("n_inner") not in (None, 4 * (config.get("n_embd") or 0)):
        raise ValueError(f"{location}: n_inner is {config['n_inner']}, and only 4 * n_embd is computed here")
    return _shape(location, *(config.get(name) for name in ("n_positions", "n_layer", "n_embd", "n_head")))


def _shape(location: Location, context_length: Any, num_layers: Any, embd_size: Any, num_heads: Any) -> ModelConfig:
    try:
        return ModelConfig(
            context_length=context_length,
            num_layers=num_layers,
            embd_size=embd_size,
            num_heads=num_heads,
            vocab_size=VOCAB_SIZE,
        )
    except ValidationError as error:
        raise ValueError(f"{location}: {first_error(error)}") from None


def _read_tensors(folder: Location) -> Weights:
    """All tensors of the folder, from one file or from parts that an index names."""
    files = file_sizes(folder)
    for name, load in (("model.safetensors", _load_safetensors), ("pytorch_model.bin", _load_pickle)):
        index = f"{name}.index.json"
        if name in files:
            return _read_file(join(folder, name), load)
        if index in files:
            try:
                parts = sorted(set(json.loads(read_text(join(folder, index)))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{join(folder, index)} is no index of weights: it has no weight_map") from None
            return {name: tensor for part in parts for name, tensor in _read_file(join(folder, part), load).items()}
    raise ValueError(
        f"{folder} holds no weights: model.safetensors or pytorch_model.bin, or the index of their parts, is needed"
    )


def _read_file(location: str, load: Callable[[Location], Weights]) -> Weights:
    try:
        return load(location)
    except FileNotFoundError:
        raise ValueError(f"{location} is missing, and the index of the weights names it") from None
    except OSError:
        raise
    except Exception as error:  # the readers raise whatever the bytes lead them to
        raise ValueError(f"{location} is not a whole file of weights ({type(error).__name__})") from None


def _load_safetensors(location: Location) -> Weights:
    if is_remote(location):
        return safetensors.torch.load(read_bytes(location))
    return safetensors.torch.load_file(local_path(location))


def _load_pickle(location: Location) -> Weights:
    source = io.BytesIO(read_bytes(location)) if is_remote(location) else local_path(location)
    loaded: Weights = torch.load(source, map_location="cpu", weights_only=True)
    return dict(loaded)


# --- llm.c -----------------------------------------------------------------------------------------------------------


def read_llmc(path: Location) -> tuple[Weights, ModelConfig]:
    """The weights and shape in a checkpoint that llm.c or its train_gpt2.py wrote, in fp32 or bf16.

    Raises ValueError when it is none, not a whole one, or one with NaN or infinity in it.
    """
    try:
        header = np.frombuffer(read_bytes(path, 0, LLMC_HEADER_BYTES), "<i4")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: there is no such file; give a .bin checkpoint of llm.c") from None
    except ValueError:  # no whole number of int32
        header = np.zeros(0, np.int32)
    if len(header) < LLMC_HEADER_BYTES // 4 or header[0] != LLMC_MAGIC:
        first = header[0] if len(header) else "missing"
        raise ValueError(f"{path} is no checkpoint of llm.c: its first int32 is {first}, not {LLMC_MAGIC}")
    version, context_length, vocab_size, num_layers, num_heads, embd_size, padded = (int(n) for n in header[1:8])
    if version not in LLMC_DTYPES:
        raise ValueError(
            f"{path} is of version {version} of llm.c's format; versions 3 (fp32) and 5 (bf16) can be read"
        )
    if vocab_size != VOCAB_SIZE or padded < vocab_size:
        raise ValueError(
            f"{path}: its vocabulary has {vocab_size} tokens, padded to {padded}, and GPT-2's has {VOCAB_SIZE}"
        )
    model = _shape(path, context_length, num_layers, embd_size, num_heads)
    weights = _read_stacks(path, model, padded, LLMC_DTYPES[version])
    check_finite(weights, path)
    return weights, model


def _read_stacks(path: Location, model: ModelConfig, padded: int, dtype: torch.dtype) -> Weights:
    shapes = {name: tuple(tensor.shape) for name, tensor in _shapes(model).items()}
    expected = LLMC_HEADER_BYTES + dtype.itemsize * (model.num_parameters() + (padded - VOCAB_SIZE) * model.embd_size)
    if (found := size(path)) != expected:
        raise ValueError(
            f"{path} is not a whole checkpoint: its header promises {expected:,} bytes, and it has {found:,}"
        )
    weights: Weights = {}
    start = LLMC_HEADER_BYTES
    for pattern in LLMC_ORDER:
        names = [pattern.format(layer) for layer in range(model.num_layers if "{}" in pattern else 1)]
        shape = (padded, model.embd_size) if pattern == LLMC_ORDER[0] else shapes[names[0]]
        end = start + dtype.itemsize * len(names) * int(np.prod(shape))
        stack = torch.frombuffer(bytearray(read_bytes(path, start, end)), dtype=dtype).float()
        weights |= {name: tensor.clone() for name, tensor in zip(names, stack.view(len(names), *shape), strict=True)}
        start = end
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:VOCAB_SIZE].clone()
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


READERS: dict[str, Callable[[Location], tuple[Weights, ModelConfig]]] = {"hf": read_huggingface, "llm.c": read_llmc}


# --- shapes ----------------------------------------------------------------------------------------------------------


def _shapes(model: ModelConfig) -> Weights:
    """The model's state dict without content."""
    with torch.device("meta"):
        return GPT(model).state_dict()


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    if foreign := [name for name in tensors if name not in expected]:
        raise ValueError(f"{where}: the tensor {foreign[0]} is none of a GPT-2 of this shape")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, and {tuple(tensor.shape)} is what "
                f"config.json promises"
            )
