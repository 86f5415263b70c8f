"""Trains one run: `python -m gpt2core.train ...`, or the same under torchrun for several GPUs.

torchrun --standalone --nproc_per_node=4 -m gpt2core.train --run_name NAME --resume latest
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from gpt2core import gpus, heartbeat, lock, terminal
from gpt2core.board import Board
from gpt2core.checkpoint import Saver, load, load_newest
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import RunConfig
from gpt2core.distributed import Ranks, StopRequest, make_deterministic
from gpt2core.flags import Parser, main_guard, run_config
from gpt2core.fp8 import refuse_fp8
from gpt2core.kernel_cache import keep_compiled_kernels
from gpt2core.launch import GRACE_S, die_with_parent, tell
from gpt2core.log_line import ENDED_BY
from gpt2core.metrics import MetricsLog
from gpt2core.preflight import preflight
from gpt2core.processes import own_age_s
from gpt2core.run_checkpoint import load_at
from gpt2core.run_folder import RunFolder
from gpt2core.storage import exists, first_line
from gpt2core.train_command import add_arguments, list_checkpoints, refuse_silent_overwrite
from gpt2core.trainer import Trainer, optimizer_of
from gpt2core.watchdog import end_orphans, show_stacks_when_asked


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.train", description="Train GPT-2.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    config = run_config(arguments)
    if arguments.list_checkpoints:
        list_checkpoints(config)
        return
    train(
        config,
        resume=arguments.resume,
        force=arguments.force,
        accept_changed_data=arguments.accept_changed_data,
        stop_epoch=arguments.stop_epoch,
    )


def train(
    config: RunConfig,
    *,
    resume: str | None,
    force: bool = False,
    accept_changed_data: bool = False,
    stop_epoch: int | None = None,
) -> None:
    """Trains this process's share of the run, from the checkpoint to the end, or to the end of `stop_epoch`."""
    loaded_after_s = own_age_s()
    stop = StopRequest()
    parent = die_with_parent()
    show_stacks_when_asked()
    refuse_silent_overwrite(config, resume)
    if stop_epoch is not None and stop_epoch < 1:
        raise ValueError(f"--stop_epoch {stop_epoch}: epochs are counted from 1")
    folder = RunFolder.of(config)
    if config.train.deterministic:
        make_deterministic()
    ranks = Ranks.join(config.train.device)
    with contextlib.ExitStack() as held:
        # for the life of the process, and no longer: a second run that would write here is refused, with who holds it
        ranks.on_main(lambda: held.enter_context(lock.hold(folder.path / lock.LOCK_FILE)))
        gpus.claim(ranks, held, f"training {config.run_name}")
        _begin_heartbeat(folder, ranks, parent)
        if parent:
            end_orphans(parent, folder.heartbeat_file, GRACE_S)
        _train(config, ranks, resume, force, accept_changed_data, stop_epoch, stop, loaded_after_s)


def _begin_heartbeat(folder: RunFolder, ranks: Ranks, parent: int | None) -> None:
    rank = heartbeat.Rank.own(parent)
    if rank is None:
        return
    everyone = ranks.gather(rank.model_dump())
    ranks.on_main(lambda: heartbeat.begin(folder.heartbeat_file, [heartbeat.Rank(**one) for one in everyone]))


def _train(
    config: RunConfig,
    ranks: Ranks,
    resume: str | None,
    force: bool,
    accept_changed_data: bool,
    stop_epoch: int | None,
    stop: StopRequest,
    loaded_after_s: float | None,
) -> None:
    folder = RunFolder.of(config)
    checkpoints = CheckpointFolder(folder.checkpoints)
    findings = preflight(config, ranks.world_size)
    ranks.on_main(checkpoints.check_writable)
    ranks.on_main(lambda: refuse_fp8(config.train, config.model, ranks.device))
    torch.set_float32_matmul_precision("high")  # TF32 for what is fp32 on the GPU
    keep_compiled_kernels()
    try:
        trainer = Trainer(config, ranks)
    except torch.OutOfMemoryError as error:
        raise BlockingIOError(f"the GPU has too little memory left to make ready ({first_line(error)})") from None
    warnings: list[str] = []

    def warn(message: str) -> None:
        warnings.append(f"WARNING: {message}")
        if ranks.is_main:  # now, for what comes next may fail; log.txt gets it when it is open
            tell(warnings[-1])

    # a forced start under the pipeline has written config.json already, and is not forced again at each resume
    (new_optimizer, *_) = ranks.gather(force or folder.was_claimed_for(config.train.optimizer))
    origin = restore(trainer, checkpoints, resume, warn, accept_changed_data, new_optimizer)
    # a signal that came while the processes made themselves ready; nothing has changed on disk yet
    (is_told_to_stop,) = ranks.any(stop.signal is not None)
    if is_told_to_stop:
        if ranks.is_main:
            tell(f"{stop.name}: ended before a step was made; the same command starts again from here")
        _leave(trainer)
        return
    ranks.on_main(lambda: folder.claim(config, force, trainer.step / trainer.steps_per_epoch))
    log = saver = None
    if ranks.is_main:
        board = Board(folder.tensorboard, config, trainer.step) if config.train.use_tensorboard else None
        log = MetricsLog(folder, resume_at=trainer.step, board=board)
        saver = Saver(checkpoints, config.train.keep_checkpoints, log.say)
        for warning in warnings:
            log.note(warning)
        for line in [
            *findings,
            trainer.describe_batch(),
            *([trainer.describe_exchange()] if ranks.world_size > 1 else []),
            f"device: {describe(ranks)}",
            f"kernels: {trainer.kernels.note}",
            trainer.describe_precision(),
            trainer.optimizer.describe(),
            *_start(loaded_after_s),
            origin,
        ]:
            log.say(line)
    begun_at = trainer.step
    stop_step = trainer.steps_per_epoch * min(stop_epoch or config.train.num_epochs, config.train.num_epochs)
    stop_step = min(ranks.gather(stop_step))  # only the machine that leads the run may have been told an epoch
    with _last_words(log):
        _fit(trainer, stop_step, stop, log, saver)
    if log:
        if trainer.step == trainer.max_steps and trainer.step > begun_at:
            results = {
                "loss": trainer.step_log.train_loss,
                "val_loss": trainer.val_loss,
                "best_val_loss": trainer.best_val_loss,
            }
            log.finish(trainer.step, {name: value for name, value in results.items() if value is not None})
        log.say(f"at step {trainer.step} of {trainer.max_steps}")
        log.close()
    _leave(trainer)


def _leave(trainer: Trainer) -> None:
    trainer.loader.close()
    trainer.ranks.leave()


def _start(loaded_after_s: float | None) -> list[str]:
    """How long the process took to get here; the first step adds what is compiled for it."""
    ready_after_s = own_age_s()
    if loaded_after_s is None or ready_after_s is None:
        return []
    return [
        f"start: ready {ready_after_s:.1f} s after the process began, {loaded_after_s:.1f} s of them to load its modules"
    ]


@contextlib.contextmanager
def _last_words(log: MetricsLog | None) -> Iterator[None]:
    """Leaves the error that ends training in log.txt, too."""
    try:
        yield
    except Exception as error:
        if log:
            log.note(f"{ENDED_BY}{first_line(error)}")
        raise


def _fit(trainer: Trainer, stop_step: int, stop: StopRequest, log: MetricsLog | None, saver: Saver | None) -> None:
    """Trains; whatever ends it, what is being saved is saved to its end."""
    try:
        trainer.fit(stop_step, stop, log, saver)
    except torch.OutOfMemoryError as error:
        raise BlockingIOError(f"the GPU's memory ran out beside training, at step {trainer.step} ({error})") from None
    finally:
        if saver:
            saver.finish()


def restore(
    trainer: Trainer,
    checkpoints: CheckpointFolder,
    resume: str | None,
    warn: Callable[[str], None],
    accept_changed_data: bool = False,
    accept_new_optimizer: bool = False,
) -> str:
    """Loads what --resume names into the trainer and says, in one line, where training starts."""
    state: dict[str, Any] | None = None
    where: object = resume
    if resume == "latest":
        state, where = load_newest(checkpoints, warn), checkpoints.location
        _check_agreement(trainer.ranks, checkpoints, state)
        if state is None:
            return f"no checkpoint in {checkpoints.location} yet: {start(trainer)}"
    elif resume is not None:
        named = checkpoints.find(resume)
        path = named.location if named else resume
        if not exists(path):
            raise ValueError(
                f"--resume {resume}: there is no such file, nor a checkpoint of that name in {checkpoints.location}"
            )
        state, where = load(path, named.sidecar if named else None), path
    if state is None:
        return f"{start(trainer)}, {trainer.max_steps} steps to do"
    trainer.load_state_dict(state, where, accept_changed_data, accept_new_optimizer)
    origin = f"resumed from {where} at step {trainer.step} of {trainer.max_steps}"
    before, now = state["data"]["fingerprint"], trainer.loader.sequences.fingerprint
    if before != now:
        origin += f"; WARNING: on other data than before, as accepted: fingerprint {before[:12]} -> {now[:12]}"
    precision_before = _precision(state["config"]["train"])
    precision = _precision(trainer.config.train.model_dump())
    if precision_before != precision:
        origin += f"; WARNING: with another precision than before, as forced: {precision_before} -> {precision}"
    if optimizer_of(state) != trainer.config.train.optimizer:
        origin += f"; WARNING: with another optimizer than before, as forced: {optimizer_of(state)} -> {trainer.config.train.optimizer}, moments from zero"
    return origin


def _precision(train: dict[str, Any]) -> str:
    """Of a run's settings; older ones had no word on it, and gradients in e5m2."""
    precision = str(train.get("precision", "auto"))
    if precision != "fp8":
        return precision
    return f"fp8 ({train['fp8_recipe']}, gradients in {train.get('fp8_gradients', 'e5m2')})"


def start(trainer: Trainer) -> str:
    """Takes the weights of --init_from, if there is one, for the run's first step; says so."""
    origin = trainer.config.train.init_from
    if origin is None:
        return "starting afresh"
    found = load_at(origin)
    if found is None:
        raise ValueError(f"--init_from {origin}: there is neither a checkpoint nor a model in a transformers folder")
    trainer.load_weights(found.state, origin)
    return f"starting from the weights in {origin}"


def _check_agreement(ranks: Ranks, checkpoints: CheckpointFolder, state: dict[str, Any] | None) -> None:
    """Raises ConnectionError when ranks, each of which looked for the newest whole checkpoint, found different ones."""
    steps = ranks.gather(state and state["step"])
    if len(set(steps)) > 1:
        raise ConnectionError(
            f"{checkpoints.location}: the ranks could read checkpoints of different steps ({steps}); "
            f"look at the warnings above, and start again"
        )


def describe(ranks: Ranks) -> str:
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{ranks.device.type} ({name}), {ranks.world_size} ranks, torch {torch.__version__}"


def _end_at_once(code: str | int | None) -> NoReturn:
    """Ends a rank that failed without the interpreter's clean-up, in which the threads of gloo abort some processes: the
    launcher would read SIGABRT in place of the code that says whether to try again."""
    terminal.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    try:
        record(lambda: main_guard(main))()  # what is no sentence goes to the launcher with its traceback
    except SystemExit as end:
        if end.code and "WORLD_SIZE" in os.environ:
            _end_at_once(end.code)
        raise
    except Exception:
        if "WORLD_SIZE" in os.environ:
            sys.excepthook(*sys.exc_info())
            _end_at_once(1)
        raise
