"""Weights that others wrote: the same logits on both ways, and one sentence for what is no whole GPT-2."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.cli import run as gpt2
from gpt2core.config import MODEL_SIZES, VOCAB_SIZE, ModelConfig
from gpt2core.import_weights import LLMC_MAGIC, from_huggingface, read_huggingface, read_llmc
from gpt2core.model import GPT
from gpt2core.run_checkpoint import load_at, load_named
from gpt2core.run_folder import RunFolder

# The four official shapes (openai-community/gpt2, -medium, -large, -xl) by layers, width, heads and parameters.
OFFICIAL = {
    "124M": (12, 768, 12, 124_439_808),
    "350M": (24, 1024, 16, 354_823_168),
    "774M": (36, 1280, 20, 774_030_080),
    "1558M": (48, 1600, 25, 1_557_611_200),
}
SCALED_DOWN = {"124M": (3, 48, 12), "350M": (4, 64, 16), "774M": (2, 80, 20), "1558M": (2, 100, 25)}


def huggingface(num_layers: int = 2, embd_size: int = 32, num_heads: int = 4, **changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 whose logits are far below zero, as OpenAI's are."""
    torch.manual_seed(num_layers)
    shape = {"n_layer": num_layers, "n_embd": embd_size, "n_head": num_heads, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**shape | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.transformer.ln_f.bias.fill_(-10.0)
        model.transformer.wte.weight.add_(10.0 / embd_size)
    return model


def ours(weights: dict[str, torch.Tensor], shape: ModelConfig) -> GPT:
    model = GPT(shape)
    model.load_state_dict(weights)
    return model.eval()


TOKENS = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return huggingface()


@pytest.fixture
def folder(theirs: GPT2LMHeadModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SCALED_DOWN)
@torch.no_grad()
def test_logits_and_losses_are_theirs_both_ways(size: str, tmp_path: Path) -> None:
    theirs = huggingface(*SCALED_DOWN[size])
    theirs.save_pretrained(tmp_path / "hf")
    assert gpt2(["import", "--from", "hf", f"{tmp_path}/hf", "--run_name", "a", "--artifacts_dir", str(tmp_path)]) == 0
    model = load_named("best", RunFolder(tmp_path, "a")).model("cpu")
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)
    loss = F.cross_entropy(expected.flatten(0, 1), TOKENS.flatten())
    assert expected.max() < -10  # rows of padding, with logits of 0, would take all probability
    torch.testing.assert_close(model(TOKENS, TOKENS), loss)
    assert gpt2(["export", "--to", "hf", f"{tmp_path}/back", "--run_name", "a", "--artifacts_dir", str(tmp_path)]) == 0
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(back(TOKENS).logits, expected)


@pytest.mark.parametrize("size", OFFICIAL)
def test_the_official_shapes_are_taken(size: str) -> None:
    num_layers, embd_size, num_heads, parameters = OFFICIAL[size]
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=num_layers, n_embd=embd_size, n_head=num_heads))
    shape = MODEL_SIZES[size].model_copy(update={"vocab_size": VOCAB_SIZE})
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    with torch.device("meta"):
        expected = GPT(shape).state_dict()
    weights = from_huggingface(tensors, shape, size)
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
    assert shape.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters()) == parameters


def as_openai(folder: Path, theirs: GPT2LMHeadModel) -> None:
    """The names without a prefix, and the causal masks, that the files on the hub have."""
    tensors = {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24) for layer in range(2)}
    tensors |= {name: tensor.contiguous() for name, tensor in theirs.transformer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def as_parts(folder: Path, theirs: GPT2LMHeadModel) -> None:
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def as_pickle(folder: Path, theirs: GPT2LMHeadModel) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")  # with lm_head.weight, tied


@pytest.mark.parametrize("rewrite", [as_openai, as_parts, as_pickle])
@torch.no_grad()
def test_all_ways_in_which_the_weights_may_lie(rewrite: Any, folder: Path, theirs: GPT2LMHeadModel) -> None:
    rewrite(folder, theirs)
    torch.testing.assert_close(ours(*read_huggingface(folder))(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_a_folder_at_a_url_is_read(folder: Path, theirs: GPT2LMHeadModel) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/imported/{path.name}", path.read_bytes())
    weights, shape = read_huggingface("memory://imported")
    assert shape.num_layers == 2
    assert torch.equal(weights["transformer.wte.weight"], theirs.transformer.wte.weight)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("run_by_the_pickle"),))


def spoil(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    weights = folder / "model.safetensors"
    match what:
        case "no config.json":
            (folder / "config.json").unlink()
        case "no JSON":
            (folder / "config.json").write_text("{")
        case "another model":
            config["model_type"] = "llama"
        case "another vocabulary":
            config["vocab_size"] = 50304
        case "another activation":
            config["activation_function"] = "relu"
        case "heads that do not divide":
            config["n_head"] = 5
        case "no width":
            del config["n_embd"]
        case "no weights":
            weights.unlink()
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "a missing tensor":
            del tensors["transformer.h.1.mlp.c_fc.bias"]
            save_file(tensors, weights)
        case "a foreign tensor":
            save_file(tensors | {"transformer.h.1.mlp.c_up.bias": torch.ones(1)}, weights)
        case "a wrong shape":
            config["n_positions"] = 32
        case "an untied head":
            save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, weights)
        case "a NaN":
            tensors["transformer.h.1.mlp.c_fc.bias"][3] = torch.nan
            save_file(tensors, weights)
        case "an infinity in a tied head":
            weights.unlink()
            tensors["transformer.wte.weight"][50256, :2] = -torch.inf
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
            torch.save(tensors, folder / "pytorch_model.bin")
        case "a missing part":
            weights.unlink()
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part_1.safetensors"}}')
        case "no index":
            weights.unlink()
            (folder / "model.safetensors.index.json").write_text("[]")
        case "a pickle that runs code":
            weights.unlink()
            torch.save(Payload(), folder / "pytorch_model.bin")
    if what not in ("no config.json", "no JSON"):
        (folder / "config.json").write_text(json.dumps(config))


SENTENCES = {
    "no config.json": "hf holds no config.json: give a folder",
    "no JSON": r"config.json cannot be read \(Expecting",
    "another model": "is not of a GPT-2: model_type is 'llama', and 'gpt2' is needed",
    "another vocabulary": "vocab_size is 50304, and GPT-2's vocabulary has 50257 tokens",
    "another activation": "activation_function is 'relu', and only 'gelu_new' is computed",
    "heads that do not divide": "embd_size 32 is not a multiple of num_heads 5",
    "no width": "embd_size: Input should be a valid integer, got None",
    "no weights": "holds no weights: model.safetensors or pytorch_model.bin",
    "cut off": "model.safetensors is not a whole file of weights",
    "a missing tensor": "1 of 28 tensors are missing, the first is transformer.h.1.mlp.c_fc.bias",
    "a foreign tensor": "transformer.h.1.mlp.c_up.bias is none of a GPT-2 of this shape",
    "a wrong shape": r"wpe.weight has shape \(24, 32\), and \(32, 32\)",
    "an untied head": "lm_head.weight is not the token embedding",
    "a NaN": "hf: transformer.h.1.mlp.c_fc.bias has 1 of 128 values that are NaN or infinite",
    "an infinity in a tied head": "transformer.wte.weight has 2 of 1,608,224 values that are NaN or infinite",
    "a missing part": "part_1.safetensors is missing",
    "no index": "model.safetensors.index.json is no index",
    "a pickle that runs code": "pytorch_model.bin is not a whole file of weights",
}


@pytest.mark.parametrize("what", SENTENCES)
def test_what_is_no_whole_gpt2_is_refused(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    spoil(folder, what)
    with pytest.raises(ValueError, match=SENTENCES[what]) as refused:
        read_huggingface(folder)
    assert "\n" not in str(refused.value)
    assert not (folder / "run_by_the_pickle").exists()


# --- llm.c -----------------------------------------------------------------------------------------------------------


def write_llmc(path: Path, model: GPT2LMHeadModel, version: int = 3) -> None:
    """The file as llm.c's train_gpt2.py writes it, from transformers' weights."""
    config, state = model.config, model.state_dict()
    header = [LLMC_MAGIC, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd]
    order = [F.pad(state["transformer.wte.weight"], (0, 0, 0, 50304 - VOCAB_SIZE)), state["transformer.wpe.weight"]]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            found = [state[f"transformer.h.{layer}.{part}.{kind}"] for layer in range(config.n_layer)]
            order += [tensor.t() if ".c_" in f".{part}" and kind == "weight" else tensor for tensor in found]
    order += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    dtype, as_integers = (torch.bfloat16, torch.int16) if version == 5 else (torch.float32, torch.int32)
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *header, 50304, *[0] * 248))
        for tensor in order:
            file.write(tensor.to(dtype).contiguous().view(as_integers).numpy().tobytes())


@pytest.mark.parametrize("version", [3, 5])
@torch.no_grad()
def test_a_checkpoint_of_llmc_has_the_same_logits(version: int, theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    write_llmc(tmp_path / "model.bin", theirs, version)
    where = ["--run_name", "from_c", "--artifacts_dir", str(tmp_path)]
    assert gpt2(["import", "--from", "llm.c", str(tmp_path / "model.bin"), *where]) == 0
    assert gpt2(["export", "--to", "hf", str(tmp_path / "hf"), *where]) == 0
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    expected = huggingface() if version == 3 else huggingface().bfloat16().float()
    assert torch.equal(back(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda content: content[:-4],
            r"is not a whole checkpoint: its header promises [\d,]+ bytes, and it has [\d,]+$",
        ),
        (lambda content: content + b"\0", "is not a whole checkpoint"),
        (lambda content: content[:1000], "is no checkpoint of llm.c: its first int32 is"),
        (lambda content: content[:3], "its first int32 is missing"),
        (lambda content: b"PK34" + content[4:], f"its first int32 is 875776848, not {LLMC_MAGIC}"),
        (lambda content: content[:4] + struct.pack("<i", 2) + content[8:], "version 2 .* versions 3 .* and 5"),
        (lambda content: content[:12] + struct.pack("<i", 50304) + content[16:], "vocabulary has 50304 tokens"),
        (
            lambda content: content[:-4] + struct.pack("<f", math.inf),
            "transformer.ln_f.bias has 1 of 32 values that are",
        ),
        (lambda content: content[:20] + struct.pack("<i", 5) + content[24:], "not a multiple of num_heads 5"),
    ],
)
def test_what_is_no_whole_checkpoint_of_llmc_is_refused(
    change: Any, sentence: str, theirs: GPT2LMHeadModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    write_llmc(path, theirs)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=sentence):
        read_llmc(path)


# --- what an import is good for --------------------------------------------------------------------------------------


@pytest.fixture
def imported(folder: Path, tmp_path: Path) -> Path:
    gpt2(["import", "--from", "hf", str(folder), "--run_name", "openai", "--artifacts_dir", str(tmp_path)])
    return tmp_path / "openai"


def test_an_import_is_a_run_of_one_checkpoint_that_says_what_it_is(imported: Path, capsys: Any) -> None:
    assert sorted(path.name for path in (imported / "checkpoints").iterdir()) == ["best_model.json", "best_model.pt"]
    state = torch.load(imported / "checkpoints" / "best_model.pt", weights_only=True)
    assert state["imported_from"].startswith("hf ") and "optimizer" not in state
    where = ["--run_name", "openai", "--artifacts_dir", str(imported.parent)]
    assert gpt2(["checkpoints", "verify", *where]) == 0
    assert gpt2(["status", "--artifacts_dir", str(imported.parent)]) == 0
    assert gpt2(["generate", "To be", "--device", "cpu", "--max_new_tokens", "4", *where]) == 0
    assert "To be" in capsys.readouterr().out
    with pytest.raises(ValueError, match="openai already holds checkpoints: give another --run_name"):
        gpt2(["import", "--from", "hf", "anything", *where])


def test_an_unknown_format_and_a_missing_place_are_refused(tmp_path: Path) -> None:
    where = ["--run_name", "a", "--artifacts_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"--from onnx: the formats known are hf and llm\.c"):
        gpt2(["import", "--from", "onnx", "x", *where])
    with pytest.raises(ValueError, match=r"nowhere holds no config\.json"):
        gpt2(["import", "--from", "hf", str(tmp_path / "nowhere"), *where])
    with pytest.raises(ValueError, match="there is no such file"):
        gpt2(["import", "--from", "llm.c", str(tmp_path / "nowhere"), *where])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_starts_from_imported_weights_and_resumes_from_its_own(
    lab: Any, imported: Path, tmp_path: Path, train_here: Any
) -> None:
    weights = imported / "checkpoints" / "best_model.pt"
    shape = {"context_length": 24, "num_heads": 4, "vocab_size": VOCAB_SIZE, "total_batch_size": 384}
    flags = lab.flags(tmp_path, init_from=weights, max_lr=1e-9, min_lr=0, steps_per_epoch=2, num_epochs=1, **shape)
    train_here([*flags, "--resume", "latest"])
    log = (tmp_path / "tiny" / "logs" / "log.txt").read_text()
    assert f"yet: starting from the weights in {weights}" in log
    mine, other = lab.load(tmp_path / "tiny" / "checkpoints" / "epoch_00001.pt")["model"], lab.load(weights)["model"]
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-5, rtol=0)
    train_here([*flags, "--resume", "latest"])
    assert "at step 2 of 2" in (tmp_path / "tiny" / "logs" / "log.txt").read_text().splitlines()[-2]


def test_weights_alone_are_not_resumed_and_must_fit(lab: Any, imported: Path, tmp_path: Path, train_here: Any) -> None:
    weights = imported / "checkpoints" / "best_model.pt"
    shape = {"context_length": 24, "num_heads": 4, "vocab_size": VOCAB_SIZE, "total_batch_size": 384}
    for resume, run_name in ((weights, "tiny"), ("latest", "openai")):
        with pytest.raises(
            ValueError, match=r"weights alone, imported from hf .*, and nothing to resume: .*--init_from"
        ):
            train_here([*lab.flags(tmp_path, run_name=run_name, **shape), "--resume", str(resume)])
    with pytest.raises(ValueError, match=r"another model .*vocab_size 50257 in it, 50304 asked for"):
        train_here(lab.flags(tmp_path, init_from=weights, **shape | {"vocab_size": None}))
    with pytest.raises(ValueError, match="--init_from nowhere: there is neither a checkpoint nor a model"):
        train_here(lab.flags(tmp_path, init_from="nowhere", **shape))


def test_a_model_that_was_exported_is_loaded_with_its_own_vocabulary(theirs: GPT2LMHeadModel, folder: Path) -> None:
    found = load_at(str(folder))
    assert found and found.config.model.vocab_size == VOCAB_SIZE
    assert np.isclose(found.model("cpu")(TOKENS).max().item(), theirs(TOKENS).logits.max().item())
    assert load_at(str(folder / "nothing")) is None
