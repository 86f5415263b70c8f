"""Every setting of a run, once: these models make the CLI's flags, the Prefect parameters and the saved config.json.

The defaults are the recipe `gpt2_124m`. What can be derived from the fields is a method, never a field.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gpt2core.credentials import LocalFolder, PathOrUrl

MEASURED_AT_ONCE = 16  # sequences: enough to fill a GPU, and 1.6 GB of logits in bf16 at 1,024 tokens
PADDED_VOCAB_SIZE = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128 for the matrix units
VOCAB_SIZE = 50257

Positive = Annotated[int, Field(ge=1)]
Frequency = Annotated[int, Field(ge=0)]  # 0 switches it off


def _is_no_other_folder(name: str) -> str:
    if name in ("best", "promoted"):
        raise ValueError(f"{name} is the name of the folder of promoted models: take another")
    return name


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"), AfterValidator(_is_no_other_folder)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Settings(BaseModel):
    """A group of settings: immutable, and a misspelt name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Fields that may differ between the run that wrote a checkpoint and the one that resumes it.
    free_to_change: ClassVar[frozenset[str]] = frozenset()


class ModelConfig(Settings):
    """Shape of the network (GPT-2, Radford et al. 2019)."""

    context_length: Positive = Field(1024, description="Longest sequence the model sees, in tokens.")
    num_layers: Positive = Field(12, description="Transformer blocks.")
    embd_size: Positive = Field(768, description="Width of the residual stream; a multiple of num_heads.")
    num_heads: Positive = Field(12, description="Attention heads in a block.")
    vocab_size: int = Field(
        PADDED_VOCAB_SIZE, ge=VOCAB_SIZE, description="Rows of the token embedding: GPT-2's 50,257 tokens plus padding."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.embd_size % self.num_heads:
            raise ValueError(f"embd_size {self.embd_size} is not a multiple of num_heads {self.num_heads}")
        return self

    def num_parameters(self) -> int:
        """Trainable parameters; the head shares its matrix with the token embedding."""
        width = self.embd_size
        vectors = self.num_layers * 13 * width  # of the blocks: biases qkv 3w, projection w, MLP 5w, two LayerNorms 4w
        embeddings = (self.vocab_size + self.context_length) * width
        return embeddings + self.num_block_weights() + vectors + 2 * width

    def num_block_weights(self) -> int:
        """Parameters in the matrices of the blocks: qkv 3w^2, projection w^2, MLP 8w^2."""
        return self.num_layers * 12 * self.embd_size**2

    def flops_per_token(self) -> int:
        """Of one training step, forward and backward: 6 N + 12 L T C (PaLM, Chowdhery et al. 2022, appendix B), where N
        leaves out the position embeddings, which are only added."""
        attention = 12 * self.num_layers * self.context_length * self.embd_size
        return 6 * (self.num_parameters() - self.context_length * self.embd_size) + attention


# GPT-2's four sizes (Radford et al. 2019, table 2; parameter counts as OpenAI's released weights have them).
MODEL_SIZES: dict[str, ModelConfig] = {
    "124M": ModelConfig(num_layers=12, embd_size=768, num_heads=12),
    "350M": ModelConfig(num_layers=24, embd_size=1024, num_heads=16),
    "774M": ModelConfig(num_layers=36, embd_size=1280, num_heads=20),
    "1558M": ModelConfig(num_layers=48, embd_size=1600, num_heads=25),
}


class DataConfig(Settings):
    """Where the tokens come from and where they lie."""

    # All of it: what the training sees is the shards, and their fingerprint is checked at resume.
    free_to_change = frozenset(
        {
            "data_dir",
            "source",
            "source_config",
            "text_column",
            "shard_size",
            "num_workers",
            "encoder",
            "on_damage",
            "cache_dir",
            "cache_gb",
        }
    )

    data_dir: PathOrUrl = Field(
        "data/edu_fineweb10B", description="Folder or fsspec URL of the token shards and their manifest.json."
    )
    source: PathOrUrl = Field(
        "HuggingFaceFW/fineweb-edu",
        description="Text to tokenize: a Hugging Face dataset (owner/name), or a path, glob or fsspec URL of "
        "parquet, jsonl or text files.",
    )
    source_config: str | None = Field(
        None,
        description="Configuration of a Hugging Face dataset; sample-10BT when the source is HuggingFaceFW/fineweb-edu.",
    )
    text_column: str = Field("text", min_length=1, description="Column that holds a document's text.")
    shard_size: int = Field(
        100_000_000, ge=1024, description="Tokens in a shard; the first one of the source is the validation shard."
    )
    num_workers: int = Field(0, ge=0, description="Processes that tokenize; 0 takes one a CPU core.")
    encoder: Literal["tiktoken", "riptoken"] = Field(
        "tiktoken",
        description="Tokenizer library; riptoken is quicker, an extra to install, and checked against tiktoken.",
    )
    on_damage: Literal["stop", "skip"] = Field(
        "stop",
        description="Documents that cannot be read: stop with an error after the rest is done, or skip and count them.",
    )
    cache_dir: PathOrUrl = Field(
        "data/cache", description="Folder for local copies of shards that lie on remote storage."
    )
    cache_gb: float = Field(100.0, gt=0, description="Most disk that these copies may take, in GB.")

    def hub_config(self) -> str | None:
        """The dataset configuration to ask the hub for."""
        if self.source_config is None and self.source == "HuggingFaceFW/fineweb-edu":
            return "sample-10BT"
        return self.source_config


class TrainConfig(Settings):
    """The optimization: batch, schedule, and what happens every so many steps (one step is one optimizer update)."""

    free_to_change = frozenset(
        {
            "mini_batch_size",
            "bucket_cap_mb",
            "eval_freq",
            "hellaswag_freq",
            "sample_freq",
            "histogram_freq",
            "checkpoint_freq",
            "checkpoint_interval_s",
            "checkpoint_dir",
            "keep_checkpoints",
            "keep_best",
            "use_tensorboard",
            "log_freq",
            "compile",
            "kernels",
            "deterministic",
            "device",
        }
    )

    total_batch_size: Positive = Field(524_288, description="Tokens in a step, over all ranks and accumulation steps.")
    mini_batch_size: Positive | Literal["auto"] = Field(
        32,
        description="Sequences a rank takes through the model at once; auto takes the largest power of two that fits.",
    )
    bucket_cap_mb: int | None = Field(
        None,
        ge=0,
        description="MiB of gradients that ranks exchange at once, while later ones are still being computed; 0: all at the end. "
        "Without it 0 on one machine's CPU or GPUs that reach each other's memory; else as DDP has it, 25 and 1 for the first.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="AdamW for all weights, or Muon for the matrices inside the blocks and AdamW for the rest."
    )
    max_lr: float = Field(1e-3, gt=0, description="Learning rate of AdamW after the warmup.")
    min_lr: float = Field(1e-4, ge=0, description="Learning rate of AdamW at the end of the schedule.")
    warmup_steps: Frequency = Field(715, description="Steps of linear warmup (375M tokens, as in GPT-3).")
    lr_schedule: Literal["cosine", "wsd"] = Field(
        "cosine",
        description="After the warmup: a cosine down to min_lr, or max_lr until the last decay_epochs (warmup, stable, decay).",
    )
    decay_epochs: float = Field(
        1.0, gt=0, description="Epochs, or a part of one, that the learning rate falls at the end of lr_schedule wsd."
    )
    num_epochs: Positive = Field(5, description="Epochs in the run; the learning rate's schedule spans all of them.")
    steps_per_epoch: Positive | Literal["auto"] = Field(
        19_073, description="Steps in an epoch; auto takes what one pass over the training shards gives."
    )
    init_from: PathOrUrl | None = Field(
        None,
        description="Weights to start from in place of fresh ones: a checkpoint's path or URL, or a folder as transformers "
        "have it; a run that has checkpoints goes on from those.",
    )
    # KellerJordan/Muon, README; the first Muon entry of modded-nanogpt's optimization track has the same (lr .02, wd .01)
    muon_lr: float = Field(0.02, gt=0, description="Muon's learning rate after the warmup; min_lr / max_lr of it last.")
    muon_momentum: Decay = Field(0.95, description="Muon's decay of the momentum.")
    muon_weight_decay: float = Field(0.01, ge=0, description="Muon's weight decay.")
    muon_qkv: Literal["whole", "split"] = Field(
        "split",
        description="How Muon takes the matrix of queries, keys and values: as one, or as three (docs/results.md).",
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay, on matrices and embeddings only.")
    beta1: Decay = Field(0.9, description="AdamW decay of the first moment.")
    beta2: Decay = Field(0.95, description="AdamW decay of the second moment (GPT-3, appendix B).")
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    seed: int = Field(1337, ge=0, description="Seed of the weights and of the data order.")
    shuffle: Literal["sequences", "shards", "none"] = Field(
        "sequences",
        description="Order of the training data in an epoch: a permutation of all sequences, of the shards, or none.",
    )
    eval_freq: Frequency = Field(250, description="Steps between validations; 0 for the end of an epoch only.")
    hellaswag_freq: Frequency = Field(
        250, description="Steps between HellaSwag evaluations while training; 0 for never."
    )
    sample_freq: Frequency = Field(250, description="Steps between generated text samples; 0 for never.")
    histogram_freq: Frequency = Field(1000, description="Steps between parameter and gradient histograms; 0 for never.")
    log_freq: Positive = Field(1, description="Steps between lines in log.txt and metrics.jsonl.")
    checkpoint_freq: Frequency = Field(250, description="Steps between checkpoints; 0 for the end of an epoch only.")
    checkpoint_interval_s: float = Field(
        0.0,
        ge=0,
        description="Most seconds of training between checkpoints, on top of checkpoint_freq; 0 for no limit.",
    )
    checkpoint_dir: PathOrUrl | None = Field(
        None,
        description="Folder or fsspec URL under which the run's checkpoints lie, in a folder of its name; "
        "without one they lie in the run's own folder.",
    )
    keep_checkpoints: Positive = Field(10, description="Rolling checkpoints kept; older ones are removed.")
    keep_best: bool = Field(
        True,
        description="Save the weights as best_model.pt after each validation that finds the run's lowest loss.",
    )
    use_tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device; auto takes a GPU if there is one."
    )
    precision: Literal["auto", "bf16", "fp32", "fp8", "fp8_head"] = Field(
        "auto",
        description="Arithmetic of the activations; auto is bf16 on GPUs that have it, else fp32. In bf16 around it, fp8 takes "
        "the products of all linear layers in 8 bits, fp8_head those of the head alone.",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "rowwise"] = Field(
        "delayed",
        description="What precision fp8 scales numbers by: the largest ones of past updates, of the tensor, or of each row.",
    )
    fp8_gradients: Literal["e4m3", "e5m2"] = Field(
        "e4m3",
        description="What precision fp8 rounds the gradients of the blocks' layers to: e4m3 is more exact by a bit, e5m2 holds "
        "numbers that are further apart.",
    )
    deterministic: bool = Field(
        False,
        description="On a GPU: kernels that give the same bits each time, slower; the CPU's always do.",
    )
    kernels: Literal["auto", "fused", "plain"] = Field(
        "auto",
        description="Fused kernels for training in bf16 on a GPU; auto takes those that work there, fused insists on them.",
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto compiles on CUDA only.")

    @model_validator(mode="before")
    @classmethod
    def _forget_an_old_default(cls, values: Any) -> Any:
        """Runs of AdamW have muon_qkv in their files, too, and it was 'whole' before it became 'split'."""
        if (
            isinstance(values, dict)
            and values.get("optimizer", "adamw") != "muon"
            and values.get("muon_qkv") == "whole"
        ):
            return {name: value for name, value in values.items() if name != "muon_qkv"}
        return values

    @model_validator(mode="after")
    def _learning_rates_descend(self) -> TrainConfig:
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} is above max_lr {self.max_lr}")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TrainConfig:
        if self.optimizer != "muon":
            self._refuse_changed(
                "optimizer muon", [name for name in type(self).model_fields if name.startswith("muon_")]
            )
        if self.precision != "fp8":
            self._refuse_changed("precision fp8", ["fp8_recipe", "fp8_gradients"])
        if self.lr_schedule != "wsd":
            self._refuse_changed("lr_schedule wsd", ["decay_epochs"])
        elif self.decay_epochs > self.num_epochs:
            raise ValueError(f"decay_epochs {self.decay_epochs} is more than num_epochs {self.num_epochs}")
        return self

    def _refuse_changed(self, only_for: str, names: list[str]) -> None:
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} {value} is for {only_for} only: give --{only_for}, or leave out --{name}")

    def is_before_decay(self, epochs: float) -> bool:
        """Whether no learning rate of the first so many epochs depends on how long the run is."""
        return self.lr_schedule == "wsd" and epochs <= self.num_epochs - self.decay_epochs


class EvalConfig(Settings):
    """What a checkpoint is measured on."""

    free_to_change = frozenset({"hellaswag", "hellaswag_convention", "val_tokens"})

    val_tokens: Positive = Field(
        2_621_440, description="Tokens of the validation shard to measure the loss on, from its start."
    )
    hellaswag: PathOrUrl = Field(
        "Rowan/hellaswag",
        description="HellaSwag's validation set: a Hugging Face dataset, or the path or URL of a jsonl file.",
    )
    hellaswag_convention: Literal["build-nanogpt", "lm-eval", "both"] = Field(
        "both",
        description="How a checkpoint's HellaSwag accuracy is measured: by build-nanogpt's convention, by lm-eval's, or both; "
        "while training it is build-nanogpt's.",
    )


Rule = Literal["val_loss", "acc_norm"]


class PromotionConfig(Settings):
    """What takes the place of the promoted model, and where it is published; no part of the run's identity."""

    rule: Rule = Field(
        "val_loss", description="Number that decides: validation loss, or HellaSwag acc_norm as build-nanogpt has it."
    )
    margin: float = Field(
        1.0,
        ge=0,
        description="By how many standard errors of the difference acc_norm must be higher; 0 for any difference. "
        "The rule val_loss takes no margin.",
    )
    publish_to: PathOrUrl | None = Field(
        None,
        description="Folder or fsspec URL that gets a copy of the promoted model, and best.json, which points to it.",
    )


class LaunchConfig(Settings):
    """How many processes train, and on how many machines; no part of the run's identity, so it may go on with other numbers."""

    nproc_per_node: Positive | Literal["auto"] = Field(
        "auto", description="Training processes on this machine; auto takes one a visible GPU, or one on the CPU."
    )
    nnodes: int = Field(
        1, ge=1, le=1024, description="Machines that train together; the same command is started on each of them."
    )
    rdzv_endpoint: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$",
        description="HOST:PORT where the machines meet: one of them, by a name or address that all of them reach.",
    )
    rdzv_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="Name of the job, the same on all machines; without one it is the run's name.",
    )
    rdzv_timeout_s: int = Field(
        1200, ge=10, le=7 * 86_400, description="Longest wait for the other machines at a start, in seconds."
    )
    local_addr: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="Name or address at which the others reach this machine; without one its host name.",
    )

    @model_validator(mode="after")
    def _machines_know_where_to_meet(self) -> LaunchConfig:
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes {self.nnodes} needs rdzv_endpoint HOST:PORT, the same on every machine")
        if self.nnodes == 1 and self.rdzv_endpoint is not None:
            raise ValueError(f"rdzv_endpoint {self.rdzv_endpoint} is for several machines: give nnodes, too")
        return self

    def torchrun_flags(self, nproc_per_node: int, run_name: str) -> list[str]:
        """What torchrun is told about processes and machines; none when a single process needs no torchrun."""
        if self.nnodes == 1:
            return ["--standalone", f"--nproc_per_node={nproc_per_node}"] if nproc_per_node > 1 else []
        assert self.rdzv_endpoint is not None
        settings = {"join_timeout": self.rdzv_timeout_s, "read_timeout": self.rdzv_timeout_s}
        flags = [
            f"--nnodes={self.nnodes}",
            f"--nproc_per_node={nproc_per_node}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={self.rdzv_endpoint}",
            f"--rdzv_id={self.rdzv_id or run_name}",
        ]
        if self.local_addr:  # torchrun would look for the endpoint's host among the addresses of the host name only
            flags.append(f"--local_addr={self.local_addr}")
            settings["is_host"] = int(self.rdzv_endpoint.rpartition(":")[0] == self.local_addr)
        return [*flags, "--rdzv_conf=" + ",".join(f"{name}={value}" for name, value in settings.items())]


class RecoveryConfig(Settings):
    """When a training that crashed or hangs is started again, and when it is given up."""

    max_attempts: Positive = Field(
        5, description="Attempts in a row without a new checkpoint after which the run fails; others are not counted."
    )
    hang_timeout_s: float = Field(
        300.0,
        ge=0,
        description="Longest time in seconds without progress (a micro-step, a batch of an evaluation, a checkpoint being "
        "written) before the trainer counts as hung and is killed to be resumed; 0 for never.",
    )
    start_timeout_s: float = Field(
        1800.0,
        ge=0,
        description="The same, in seconds, until the first step is done, while data is fetched and the model compiled, and "
        "for an evaluation of its own; 0 for never.",
    )


class RunnerConfig(Settings):
    """Where the source's files are tokenized under Prefect; the shards do not depend on it."""

    task_runner: Literal["threads", "processes", "dask", "ray"] = Field(
        "threads",
        description="Prefect task runner of the files: threads or processes here, or Dask or Ray (extras to install).",
    )
    task_runner_address: PathOrUrl | None = Field(
        None, description="Address of a Dask scheduler or Ray head; without one a cluster is started on this machine."
    )
    files_at_once: int = Field(0, ge=0, description="Source files tokenized at a time; 0 takes one a CPU core.")

    def division(self, files: int, num_workers: int) -> tuple[int, int]:
        """Files to tokenize at a time, and the processes for each: two a core, so that none idles at a file's end."""
        cores = num_workers or os.cpu_count() or 1
        at_once = min(files, self.files_at_once or cores)
        return at_once, cores if at_once == 1 else max(1, 2 * cores // at_once)


class RunConfig(Settings):
    """The whole configuration of a run, as config.json in its folder has it."""

    run_name: RunName = Field(
        "gpt2_124m", description="Name of the run and of its folder: letters, digits, '.', '_' and '-'."
    )
    artifacts_dir: LocalFolder = Field("artifacts", description="Folder under which each run has a folder of its own.")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()

    free_to_change = frozenset({"artifacts_dir"})

    @model_validator(mode="after")
    def _batch_holds_whole_sequences(self) -> RunConfig:
        if self.train.total_batch_size % self.model.context_length:
            raise ValueError(
                f"total_batch_size {self.train.total_batch_size} tokens is not a multiple of "
                f"context_length {self.model.context_length}; nearest: {_multiples_near(self.train.total_batch_size, self.model.context_length)}"
            )
        return self

    def sequences_per_step(self) -> int:
        return self.train.total_batch_size // self.model.context_length

    def mini_batch_sizes(self, world_size: int) -> list[int]:
        """The sizes that the trainer may take, to be tried in this order: powers of two for auto, else the one asked for and
        its halves; each with the same total batch.

        Raises ValueError, with numbers that would do, when the total batch cannot be split evenly.
        """
        wanted = self.train.mini_batch_size
        if wanted == "auto":
            self.grad_accum_steps(world_size, 1)
            wanted = 2 ** int(math.log2(self.sequences_per_step() // world_size))
        else:
            self.grad_accum_steps(world_size)
        sizes = [wanted]
        while sizes[-1] % 2 == 0:
            sizes.append(sizes[-1] // 2)
        return [size for size in sizes if self.sequences_per_step() % (size * world_size) == 0]

    def batch_size_without_gradients(self) -> int:
        """Sequences at once where the model is only measured: its logits exist as a whole there, which in training they
        need not, so that of a small model fewer sequences fit."""
        asked = self.train.mini_batch_size
        return MEASURED_AT_ONCE if asked == "auto" else min(MEASURED_AT_ONCE, asked)

    def grad_accum_steps(self, world_size: int, mini_batch_size: int | None = None) -> int:
        """Micro-steps a rank makes in one step, so that all ranks together see total_batch_size tokens.

        Raises ValueError, with numbers that would do, when the total batch cannot be split evenly.
        """
        if mini_batch_size is None:
            mini_batch_size = 1 if self.train.mini_batch_size == "auto" else self.train.mini_batch_size
        sequences, per_micro_step = self.sequences_per_step(), mini_batch_size * world_size
        if sequences % per_micro_step == 0:
            return sequences // per_micro_step
        fitting = [size for size in range(1, sequences + 1) if sequences % (size * world_size) == 0]
        per_micro_step_tokens = per_micro_step * self.model.context_length
        advice = f"total_batch_size {_multiples_near(self.train.total_batch_size, per_micro_step_tokens)}"
        if fitting:
            nearest = sorted(fitting, key=lambda size: abs(math.log(size / mini_batch_size)))[:3]
            advice = f"mini_batch_size {' or '.join(str(size) for size in sorted(nearest))}, or {advice}"
        raise ValueError(
            f"total_batch_size {self.train.total_batch_size} tokens does not divide into mini_batch_size "
            f"{mini_batch_size} x context_length {self.model.context_length} x {world_size} ranks; "
            f"use {advice}"
        )

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: fp32 weights and AdamW's two moments, or the one that Muon has of a matrix."""
        moments = 2 * self.model.num_parameters()
        if self.train.optimizer == "muon":
            moments -= self.model.num_block_weights()
        return 4 * (self.model.num_parameters() + moments)


def _multiples_near(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)


RECIPES: dict[str, RunConfig] = {
    "gpt2_124m": RunConfig(),
    # Small enough for two CPU cores in under two minutes, big enough to learn something from Tiny Shakespeare.
    "demo": RunConfig(
        run_name="demo",
        model=ModelConfig(context_length=128, num_layers=4, embd_size=64, num_heads=4),
        data=DataConfig(data_dir="data/demo", source="data/sample/tinyshakespeare.txt", shard_size=32_768),
        train=TrainConfig(
            total_batch_size=4096,
            mini_batch_size=2,
            max_lr=5e-3,
            min_lr=5e-4,
            warmup_steps=10,
            num_epochs=2,
            steps_per_epoch=40,
            eval_freq=20,
            hellaswag_freq=0,
            sample_freq=0,
            histogram_freq=40,
            checkpoint_freq=20,
            keep_checkpoints=3,
            device="cpu",
        ),
        evaluation=EvalConfig(
            val_tokens=32_640, hellaswag="data/sample/hellaswag_sample.jsonl", hellaswag_convention="build-nanogpt"
        ),
    ),
}


def differences(saved: Settings, wanted: Settings, prefix: str = "") -> list[str]:
    """What differs between two configurations and may not, as lines such as 'train.max_lr: 0.001 -> 0.002'."""
    found: list[str] = []
    for name in type(saved).model_fields:
        before, after = getattr(saved, name), getattr(wanted, name)
        if isinstance(before, Settings):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after and name not in saved.free_to_change:
            found.append(f"{prefix}{name}: {before} -> {after}")
    return found


def first_error(error: Any) -> str:
    """A pydantic ValidationError as one sentence that names the field, the value and what is wrong."""
    detail = error.errors()[0]
    where = ".".join(str(part) for part in detail["loc"] if not str(part).startswith(("literal[", "constrained-")))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{where}: there is no such setting"
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {detail['input']!r}"
