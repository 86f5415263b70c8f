"""The training loop: state that can be saved and resumed, and `fit`, which tells the story of a run."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2core import heartbeat
from gpt2core.accumulation import accumulate, gradients
from gpt2core.batch_size import fewer_when_memory_runs_out, fitting_mini_batch_size
from gpt2core.checkpoint import Saver, check_same_model
from gpt2core.checkpoint_folder import BEST, FORMAT, epoch_name
from gpt2core.code_version import code_version
from gpt2core.config import EvalConfig, RunConfig, TrainConfig
from gpt2core.distributed import Ranks, StopRequest, pick_dtype, use_compile
from gpt2core.evaluation import validation_loss
from gpt2core.fp8 import FP8, equip
from gpt2core.generate import samples
from gpt2core.hellaswag import Questions, evaluate_hellaswag, load_hellaswag
from gpt2core.kernels import pick_kernels
from gpt2core.launch import tell
from gpt2core.loader import Loader, Sequences
from gpt2core.metrics import MetricsLog
from gpt2core.model import GPT
from gpt2core.optim import build_optimizer, learning_rate, set_learning_rate
from gpt2core.shards import SPLITS, cache_of, keep_here, open_shards
from gpt2core.step_log import StepLog, StepResult

SEQUENCES_TO_CALIBRATE = 4  # enough for FP8's first factors, which have room to spare, and sure to fit


# Within DDP the model is compiled in several graphs, so that the exchange of one's gradients goes on while the next ones are
# computed. torch.compile keeps these apart from the whole model's only where the options differ; this one is the default.
IN_BUCKETS = {"triton.cudagraphs": False}


class Trainer:
    """One rank's share of a run."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.code = code_version()  # now: files may change while it trains
        train = config.train
        cache = cache_of(config.data, tell)
        train_shards, val_shards = (open_shards(config.data.data_dir, split, cache) for split in SPLITS)
        # the other orders read shard after shard, and remote ones come as they are needed
        keep_here([*val_shards, *(train_shards if train.shuffle == "sequences" else [])])
        sequences = Sequences(train_shards, config.model.context_length)
        self.val_sequences = Sequences(val_shards, config.model.context_length)
        self.steps_per_epoch = steps_per_epoch(config, sequences)
        self.max_steps = train.num_epochs * self.steps_per_epoch
        seed_everything(train.seed + ranks.rank)
        dtype = pick_dtype(train.precision, ranks.device)
        self.kernels = pick_kernels(train.kernels, ranks.device, dtype, config.model, train.precision == "fp8")
        self.raw_model = GPT(config.model, dtype, self.kernels)
        self.raw_model.init_weights(torch.Generator().manual_seed(train.seed))
        self.raw_model.to(ranks.device)
        # DDP would do so, too; and NCCL has the memory it needs before a mini-batch is tried
        ranks.take_over(parameter.detach() for parameter in self.raw_model.parameters())
        self.fp8 = equip(self.raw_model, train, ranks)
        self.optimizer = build_optimizer(self.raw_model, train, ranks.rank, ranks.world_size)
        self.alone = self.together = _compiled(self.raw_model, train, ranks)
        if ranks.world_size > 1 and exchanges_in_buckets(train, ranks):
            on = [ranks.device] if ranks.device.type == "cuda" else None
            in_buckets = _compiled(self.raw_model, train, ranks, IN_BUCKETS)
            self.together = DistributedDataParallel(
                in_buckets, device_ids=on, gradient_as_bucket_view=True, bucket_cap_mb=train.bucket_cap_mb
            )
        self.mini_batch_size = fitting_mini_batch_size(self.alone, self.together, config, ranks)
        self.accum_steps = config.grad_accum_steps(ranks.world_size, self.mini_batch_size)
        self.loader = Loader(
            sequences,
            sequences_per_step=config.sequences_per_step(),
            mini_batch_size=self.mini_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=train.shuffle,
            seed=train.seed,
            device=ranks.device,
        )
        self.hellaswag = _hellaswag_questions(config) if train.hellaswag_freq else None
        self.step = 0
        self.step_log = StepLog(config, ranks, self.loader, self.fp8, self.max_steps)
        self.saved_at = time.perf_counter()  # of this rank's clock
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None
        self.skipped_in_a_row = torch.zeros((), device=ranks.device)

    def describe_batch(self) -> str:
        asked = self.config.train.mini_batch_size
        note = "" if asked == self.mini_batch_size else f" (mini_batch_size {asked}: as many as fit)"
        return (
            f"batch: {self.config.train.total_batch_size:,} tokens = {self.accum_steps} accumulation steps "
            f"x {self.ranks.world_size} ranks x {self.mini_batch_size} sequences{note}"
        )

    def describe_exchange(self) -> str:
        if not isinstance(self.together, DistributedDataParallel):
            return "gradients: exchanged all at once, after the last micro-step"
        size = self.config.train.bucket_cap_mb or "DDP's 25"
        return f"gradients: exchanged in buckets of {size} MiB, during the backward pass of the last micro-step"

    def describe_precision(self) -> str:
        if self.fp8:
            return self.fp8.describe()
        names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
        return f"precision: activations in {names[self.raw_model.compute_dtype]}, weights and moments in fp32"

    # --- the story ---

    def fit(self, stop_step: int, stop: StopRequest, log: MetricsLog | None, saver: Saver | None) -> None:
        """Trains until `stop_step` steps are done or a signal asks to stop; both end with a checkpoint.

        Only rank 0 has a log and a saver. Raises FloatingPointError when update after update is not finite,
        BlockingIOError when the GPU's memory runs out in one.
        """
        train = self.config.train
        if self.step == 0:
            self.validate(log)
        self.saved_at = self.now()
        self.step_log.begin(self.step)
        stopped = overdue = False
        while self.step < stop_step and not stopped:
            with fewer_when_memory_runs_out(self.config, self.ranks, self.mini_batch_size, self.step):
                result = self.train_step()
            heartbeat.under_way()
            self.step += 1
            at_end_of_epoch = self.step % self.steps_per_epoch == 0
            stopped, is_save_due = self.ranks.any(stop.signal is not None, self.is_save_due())
            last = stopped or self.step == stop_step
            overdue = overdue or is_save_due
            if self.is_due(train.log_freq) or overdue or at_end_of_epoch or last:
                self.step_log.add(self.step, result, log)
            if not (self.is_evaluation_due() or overdue or at_end_of_epoch or last):
                continue
            self.step_log.catch_up(log)
            aside = self.now()
            best = (self.is_due(train.eval_freq) or at_end_of_epoch) and self.validate(log) and train.keep_best
            if self.is_due(train.hellaswag_freq):
                self.evaluate_hellaswag(log)
            if log and self.is_due(train.sample_freq):
                log.samples(self.step, samples(self.raw_model))
            if log and self.is_due(train.histogram_freq):
                log.histograms(self.step, self.raw_model)
            # while updates are left out nothing changes, so that a save can wait; what has a name of its own cannot
            if last or at_end_of_epoch or best or (overdue and not self.step_log.skipped):
                overdue = False
                if log:
                    log.flush()
                self.save(saver, at_end_of_epoch=at_end_of_epoch, best=best)
            self.step_log.leave_out(time.perf_counter() - aside)
        self.finish_saving(saver)
        if log and stopped:
            log.say(f"{stop.name}: saved at step {self.step}; go on with --resume latest")

    def is_save_due(self) -> bool:
        """By steps, or by the clock of this rank."""
        interval_s = self.config.train.checkpoint_interval_s
        overdue = interval_s > 0 and time.perf_counter() - self.saved_at >= interval_s
        return overdue or self.is_due(self.config.train.checkpoint_freq)

    def now(self) -> float:
        """The time, once the device has done all that it was given: it runs behind, and only so is a step's time its own."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter()

    def is_evaluation_due(self) -> bool:
        """Whether anything is to be measured or drawn after this step that costs time of its own."""
        train = self.config.train
        frequencies = (train.eval_freq, train.hellaswag_freq, train.sample_freq, train.histogram_freq)
        return any(self.is_due(frequency) for frequency in frequencies)

    def is_due(self, frequency: int) -> bool:
        return frequency > 0 and self.step % frequency == 0

    def train_step(self) -> StepResult:
        """One optimizer update over total_batch_size tokens; ranks exchange gradients once, in the last micro-step or after it."""
        train = self.config.train
        lr = learning_rate(self.step, self.max_steps, train)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad()  # not after the update: histograms look at them between steps
        loss = torch.zeros((), device=self.ranks.device)
        for micro_step in range(self.accum_steps):
            inputs, targets = self.loader.next_batch()  # each (B, T)
            if self.fp8 and not self.fp8.is_calibrated:
                self._calibrate(self.fp8, inputs, targets)
            loss += accumulate(self.alone, self.together, inputs, targets, micro_step, self.accum_steps)
            heartbeat.beat()
        if not isinstance(self.together, DistributedDataParallel):
            self.ranks.average(gradients(self.raw_model))
        grad_norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), train.grad_clip)
        self._update(grad_norm)
        return StepResult(loss, grad_norm, self.skipped_in_a_row, lr)

    def _update(self, grad_norm: Tensor) -> None:
        """Applies the gradients, unless one is not finite. The decision is taken on the device, so the host need not wait."""
        is_bad = (~grad_norm.isfinite()).float()
        self.optimizer.step(is_bad)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * is_bad
        if self.fp8:
            self.fp8.updated(is_bad)

    def _calibrate(self, fp8: FP8, inputs: Tensor, targets: Tensor) -> None:
        """By a few sequences, whose gradients are made as small as they will be among all of a step."""
        some = slice(0, SEQUENCES_TO_CALIBRATE)
        share = len(inputs[some]) / len(inputs) / self.accum_steps
        fp8.calibrate(lambda: share * self.raw_model(inputs[some], targets[some]), list(self.raw_model.parameters()))

    # --- measuring ---

    def validate(self, log: MetricsLog | None) -> bool:
        """Measures the validation loss; True when it is the run's best so far."""
        self.val_loss = validation_loss(
            lambda inputs, targets: self.alone(inputs, targets, reduction="none"),
            self.val_sequences,
            self.config.evaluation.val_tokens,
            min(self.mini_batch_size, self.config.batch_size_without_gradients()),
            self.ranks,
        ).mean
        if log:
            log.numbers(self.step, val_loss=self.val_loss)
        is_lower = self.best_val_loss is None or self.val_loss < self.best_val_loss
        is_best = self.step > 0 and math.isfinite(self.val_loss) and is_lower
        if is_best:
            self.best_val_loss = self.val_loss
        return is_best

    def evaluate_hellaswag(self, log: MetricsLog | None) -> None:
        if not self.hellaswag:
            return
        began = self.now()
        result = evaluate_hellaswag(self.raw_model, self.hellaswag, self.ranks)
        if log:
            seconds = self.now() - began
            log.numbers(
                self.step,
                acc=result.acc,
                acc_norm=result.acc_norm,
                acc_stderr=result.acc_stderr,
                acc_norm_stderr=result.acc_norm_stderr,
                examples=result.examples,
                hellaswag_s=seconds,
            )

    # --- state ---

    def save(self, saver: Saver | None, *, at_end_of_epoch: bool = False, best: bool = False) -> None:
        """Hands the state of all ranks to rank 0's saver, which writes it while training goes on."""
        rng_states = self.ranks.gather(rng_state(self.ranks.device))
        if saver:
            names = [epoch_name(self.step // self.steps_per_epoch)] if at_end_of_epoch else []
            saver.begin(self.state_dict() | {"rng": rng_states}, names + [BEST] * best)
        self.saved_at = time.perf_counter()

    def finish_saving(self, saver: Saver | None) -> None:
        """Waits for the last checkpoint. Raises on all ranks when it could not be written: ConnectionError, which may
        pass, when that is what rank 0 met, else ValueError."""
        if saver:
            saver.finish()
        failed = saver is not None and saver.error is not None
        if self.ranks.any(failed)[0]:
            where, why = (saver.folder.location, saver.error) if saver else ("rank 0", "see there")
            kind = ConnectionError if isinstance(why, ConnectionError) else ValueError
            raise kind(f"{where}: the checkpoint of step {self.step} could not be written ({why})")

    def state_dict(self) -> dict[str, Any]:
        """All that the run depends on but the random number generators, which each rank has of its own."""
        return {
            "format": FORMAT,
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "tokens_seen": self.step * self.config.train.total_batch_size,
            "train_seconds": self.step_log.train_seconds,
            "train_loss": self.step_log.train_loss,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "config": self.config.model_dump(mode="json"),
            "model": self.raw_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.loader.state_dict(),
            "code": self.code.model_dump(),
        } | ({"fp8": self.fp8.state_dict()} if self.fp8 else {})

    def load_weights(self, state: dict[str, Any], where: object) -> None:
        """Takes the weights alone. Raises ValueError, saying what differs, when they are of another model."""
        check_same_model(where, state["config"]["model"], self.config.model.model_dump())
        self.raw_model.load_state_dict(state["model"])
        if self.fp8:
            self.fp8.weights_changed()

    def load_state_dict(
        self,
        state: dict[str, Any],
        where: object,
        accept_changed_data: bool = False,
        accept_new_optimizer: bool = False,
    ) -> None:
        """Goes on from a saved state. Raises ValueError, saying what differs, when it is of another model, data or
        optimizer; one that is accepted begins with moments of zero."""
        if "optimizer" not in state:
            raise ValueError(
                f"{where} holds weights alone, imported from {state.get('imported_from')}, and nothing to resume: "
                f"start another run from them with --init_from and its path"
            )
        before, now = optimizer_of(state), self.config.train.optimizer
        if before != now and not accept_new_optimizer:
            raise ValueError(
                f"{where} was trained with optimizer {before}, and {now} is asked for: give --optimizer {before}, "
                f"or --force to go on with {now}, whose moments then start from zero"
            )
        self.load_weights(state, where)
        self.loader.load_state_dict(state["data"], accept_changed_data)
        if before == now:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.fp8:
            self.fp8.load_state_dict(state.get("fp8", {}))
        self.step = state["step"]
        self.step_log.train_seconds, self.step_log.train_loss = state["train_seconds"], state["train_loss"]
        self.val_loss, self.best_val_loss = state["val_loss"], state["best_val_loss"]
        if self.ranks.rank < len(state["rng"]):  # a rank that was not there before keeps the seeds it started with
            set_rng_state(state["rng"][self.ranks.rank], self.ranks.device)


def optimizer_of(state: dict[str, Any]) -> str:
    """The optimizer that a saved state was trained with; older ones do not say."""
    return str(state["config"]["train"].get("optimizer", "adamw"))


def steps_per_epoch(config: RunConfig, sequences: Sequences) -> int:
    """Steps in an epoch. Raises ValueError when the data does not fill one step."""
    if config.train.steps_per_epoch != "auto":
        return config.train.steps_per_epoch
    steps = len(sequences) // config.sequences_per_step()
    if steps == 0:
        raise ValueError(
            f"{config.data.data_dir} has {len(sequences)} sequences of {config.model.context_length} tokens to train on, "
            f"fewer than the {config.sequences_per_step()} of one step: lower --total_batch_size"
        )
    return steps


def exchanges_in_buckets(train: TrainConfig, ranks: Ranks) -> bool:
    """Whether DDP exchanges gradients while later ones are still being computed, which hides what a slow connection takes.

    Two H200 with NVLink are faster when it waits for the end (docs/results.md): for buckets the model is compiled in more pieces,
    and the gradients are copied; and what exchanges them beside products presumably takes multiprocessors from these. Raises
    ValueError when the ranks were told different things.
    """
    asked = ranks.gather(train.bucket_cap_mb)
    if len(set(asked)) > 1:
        raise ValueError(f"--bucket_cap_mb is not the same on all ranks ({asked}): give one on all machines")
    if train.bucket_cap_mb is None:
        return not ranks.are_linked()
    return train.bucket_cap_mb > 0


def _compiled(model: nn.Module, train: TrainConfig, ranks: Ranks, options: dict[str, Any] | None = None) -> nn.Module:
    if not use_compile(train, ranks.device):
        return model
    return torch.compile(model, dynamic=False, options=options)  # type: ignore[return-value]


def _hellaswag_questions(config: RunConfig) -> Questions | None:
    """The questions; None, with a loud word, when the default source cannot be reached."""
    source = config.evaluation.hellaswag
    try:
        examples = load_hellaswag(source)
    except ValueError as error:
        if source != EvalConfig().hellaswag:
            raise
        tell(f"WARNING: training goes on without HellaSwag: {error}")
        return None
    return Questions.of(examples, "build-nanogpt", config.model.context_length)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # the global generator is part of what a checkpoint promises to keep
    random.seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every generator in this process, in types that torch.load(weights_only=True) reads."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
