"""What must be right before a long run starts, checked in seconds."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from gpt2core.checkpoint_folder import LATEST, ROLLING, CheckpointFolder
from gpt2core.config import LaunchConfig, RunConfig, TrainConfig
from gpt2core.flags import TRY_AGAIN
from gpt2core.launch import num_processes
from gpt2core.ports import taken
from gpt2core.run_folder import RunFolder
from gpt2core.shards import SPLITS, cache_of, check_cache_room, open_shards
from gpt2core.storage import file_sizes, is_remote, local_path

LOG_BYTES_A_STEP = 1500  # of metrics.jsonl, log.txt and the scalars of TensorBoard together
HISTOGRAM_BYTES = 1200  # of one tensor's histogram
STATE_BYTES_A_PARAMETER = 16  # on the GPU: weights, gradients and AdamW's two moments in fp32
PORTS = {"TensorBoard": 6006, "Prefect": 4200}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Literal["ok", "warning", "error"]
    text: str  # what was found and, where it is not right, what to do
    cause: Exception | None = None

    def __str__(self) -> str:
        return f"{self.verdict:<8}{self.what:<10}{self.text}"


def claim_run(config: RunConfig, launched: LaunchConfig, force: bool = False) -> None:
    """Writes the run's config.json, after the checks that need no data: before hours of preparation, not after.

    Raises ValueError when the batch does not divide, a GPU, the kernels it must have or the file of HellaSwag is not there,
    or, without `force`, the folder holds a run with other settings.
    """
    config.grad_accum_steps(launched.nnodes * num_processes(launched.nproc_per_node, config.train.device))
    _hellaswag(config)
    if _insists_on_kernels(config.train):
        _kernels(config)
    RunFolder.of(config).claim(config, force)


def preflight(config: RunConfig, world_size: int) -> list[str]:
    """Lines that say what was found. Raises ValueError at the first thing that would stop the run, ConnectionError when
    it may pass."""
    lines = []
    for finding in _look(config, world_size):
        if finding.verdict == "error":
            raise finding.cause or ValueError(finding.text)
        prefix = "WARNING: " if finding.verdict == "warning" else ""
        lines.append(f"{prefix}{finding.what}: {finding.text}")
    return lines


def examine(config: RunConfig, world_size: int) -> list[Finding]:
    """All that preflight looks at, whatever is wrong with it."""
    return list(_look(config, world_size))


def _look(config: RunConfig, world_size: int) -> Iterator[Finding]:
    yield _checked("batch", lambda: _batch(config, world_size))
    millions = config.model.num_parameters() / 1e6
    yield Finding("model", "ok", f"{millions:.1f}M parameters, context {config.model.context_length}")
    yield _checked("data", lambda: _data(config))
    yield _checked("HellaSwag", lambda: _hellaswag(config))
    yield _checked("folders", lambda: _writable(config))
    yield _checked("disk", lambda: _disk_space(config))
    yield _checked("clock", lambda: _clock(config))


def _checked(what: str, look: Callable[[], Finding | str]) -> Finding:
    try:
        found = look()
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        return Finding(what, "error", str(error), error)
    return Finding(what, "ok", found) if isinstance(found, str) else found


def _batch(config: RunConfig, world_size: int) -> str:
    steps = config.grad_accum_steps(world_size)
    most = "at most " if config.train.mini_batch_size == "auto" else ""  # auto takes as many sequences at once as fit
    return f"{config.train.total_batch_size:,} tokens over {world_size} ranks, {most}{steps} accumulation steps each"


def _data(config: RunConfig) -> str:
    """Raises ValueError when the shards are not there or not whole, by their headers, sizes and manifest."""
    opened = {split: open_shards(config.data.data_dir, split, cache_of(config.data)) for split in SPLITS}
    check_cache_room(opened["train"], opened["val"], config.train.shuffle)
    told = [
        f"{split} {sum(shard.num_tokens for shard in shards):,} tokens in {len(shards)} shards"
        for split, shards in opened.items()
    ]
    return ", ".join(told)


def _hellaswag(config: RunConfig) -> str:
    """Raises ValueError when its file cannot be read: the first evaluation may be a week away."""
    from gpt2core.hellaswag import is_file, load_hellaswag

    source = config.evaluation.hellaswag
    return (
        f"{len(load_hellaswag(source)):,} examples of {source}"
        if is_file(source)
        else f"{source}, asked for when needed"
    )


def _writable(config: RunConfig) -> str:
    folder = RunFolder.of(config)
    for place in (folder.path, *([] if is_remote(folder.checkpoints) else [local_path(folder.checkpoints)])):
        above = _nearest(place)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(
                f"{place} cannot be written to, because of {above}: give this user the right to, or another folder"
            )
    return f"{folder.path} can be written to"


def _nearest(place: Path) -> Path:
    """The place itself or, while it is not there, the folder that it would be made in."""
    return place if place.exists() else _nearest(place.absolute().parent)


def _disk_space(config: RunConfig) -> Finding | str:
    """Room for what the run has still to write.

    The tiers hold the rolling checkpoints (latest and its backup are among them), one an epoch and the best, and one more
    is written before an old one goes. A run that goes on needs only what is not there yet, and never more files than it
    has saves left; since old rolling ones make room as it goes, room for one checkpoint is enough to let it.
    """
    location = RunFolder.of(config).checkpoints
    if is_remote(location):
        return f"checkpoints go to {location}"
    folder, train = CheckpointFolder(location), config.train
    place = local_path(location)
    latest = folder.find(LATEST)
    one = latest.sidecar.bytes if latest else config.checkpoint_bytes()
    planned = train.keep_checkpoints + train.num_epochs + train.keep_best + 1
    there = folder.disk_bytes()
    rolling = [name for name in file_sizes(location) if ROLLING.match(name)]
    leaving = max(0, len(rolling) - train.keep_checkpoints)  # goes at the next save
    saves = _saves_left(config, latest.sidecar.step if latest else 0)
    files = planned if saves is None else min(planned, saves)
    needed = min(files * one, max(one, planned * one - there)) if files else 0
    logs = _log_bytes(config)
    free = shutil.disk_usage(_nearest(place)).free
    sum_of = (
        f"{planned} files of {one / 1e9:.2f} GB ({train.keep_checkpoints} rolling, {train.num_epochs} epochs, "
        f"{'the best, ' * train.keep_best}the one being written) = {planned * one / 1e9:.1f} GB, of which {there / 1e9:.1f} GB are there"
        + (f" and {leaving} old rolling ones go" if leaving else "")
        + f"; logs up to {logs / 1e9:.1f} GB"
    )
    if free >= needed + logs:
        return f"{free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB more are needed: {sum_of}"
    text = (
        f"{place} has {free / 1e9:.1f} GB free, and the run's checkpoints need {needed / 1e9:.1f} GB more ({sum_of}): "
        f"free some space or lower --keep_checkpoints"
    )
    # training goes on without logs that cannot be written
    enough_to_go_on = free >= (needed if latest is None else min(needed, one))
    return Finding("disk", "warning" if enough_to_go_on else "error", text)


def _saves_left(config: RunConfig, step: int) -> int | None:
    """How many checkpoints the run has still to write at most, None when the clock decides."""
    train = config.train
    if train.steps_per_epoch == "auto" or train.checkpoint_interval_s:
        return None
    left = train.num_epochs * train.steps_per_epoch - step
    by_freq = [left // freq + 1 for freq in (train.checkpoint_freq, train.eval_freq * train.keep_best) if freq]
    return sum(by_freq) + left // train.steps_per_epoch + 1 if left > 0 else 0


def _log_bytes(config: RunConfig) -> int:
    train = config.train
    steps = train.num_epochs * (train.steps_per_epoch if train.steps_per_epoch != "auto" else 0)
    tensors = 2 * (12 * config.model.num_layers + 4)  # parameters and gradients
    histograms = steps // train.histogram_freq * tensors * HISTOGRAM_BYTES if train.histogram_freq else 0
    return steps // train.log_freq * LOG_BYTES_A_STEP + histograms


def _clock(config: RunConfig) -> Finding | str:
    """A clock that stands before the last checkpoint was set back, and ages and times to go are wrong."""
    newest = max((path.stat().st_mtime for path in (RunFolder.of(config).metrics_file,) if path.exists()), default=0.0)
    built = Path(__file__).stat().st_mtime
    now = time.time()
    told = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
    if now < max(newest, built) - 60:
        later = datetime.fromtimestamp(max(newest, built)).astimezone()
        text = f"the clock says {told}, and files here are from {later:%Y-%m-%d %H:%M:%S}: set it (timedatectl set-ntp true)"
        return Finding("clock", "warning", text)
    return told


# --- the machine -----------------------------------------------------------------------------------------------------


def examine_machine(config: RunConfig, launched: LaunchConfig) -> list[Finding]:
    """What the run needs of the machine beside data and disk: GPUs, ports, packages."""
    return [
        _checked("GPUs", lambda: _gpus(config, launched)),
        *([_checked("kernels", lambda: _kernels(config))] if _insists_on_kernels(config.train) else []),
        _checked("ports", lambda: _ports(launched)),
        _checked("packages", lambda: _packages()),
    ]


def _gpus(config: RunConfig, launched: LaunchConfig) -> Finding | str:
    wanted = num_processes(launched.nproc_per_node, config.train.device)
    code = (
        "from torch import cuda\n"
        "for gpu in range(cuda.device_count()):\n"
        "    print(cuda.get_device_name(gpu), *cuda.mem_get_info(gpu), sep='|')"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    gpus = [line.split("|") for line in listed if line][:wanted]
    if config.train.device == "cpu":
        return f"none is used, {wanted} processes on {os.cpu_count()} CPU cores"
    if not gpus:
        text = f"none is visible, {wanted} processes on {os.cpu_count()} CPU cores: if there is one, look at nvidia-smi"
        return Finding("GPUs", "warning", text)
    state = STATE_BYTES_A_PARAMETER * config.model.num_parameters()
    told = [f"{name} ({int(free) / 2**30:.0f} of {int(total) / 2**30:.0f} GiB free)" for name, free, total in gpus]
    text = f"{', '.join(told)}; weights, gradients and moments take {state / 2**30:.1f} GiB of each"
    if any(int(free) < state for _, free, _ in gpus):
        return Finding("GPUs", "error", f"{text}: end what else runs there, or take a smaller --model_size")
    return text


def _insists_on_kernels(train: TrainConfig) -> bool:
    """Whether it asks for what not every device has, and must not be replaced."""
    return train.precision.startswith("fp8") or train.kernels == "fused"


def _kernels(config: RunConfig) -> str:
    """Asked in a process of its own, so that no memory of a GPU is held here. Raises ValueError where they cannot be had,
    BlockingIOError where memory is short, which may pass."""
    code = (
        "import sys, torch\n"
        "from gpt2core.config import RunConfig\n"
        "from gpt2core.distributed import make_deterministic, pick_device, pick_dtype\n"
        "from gpt2core.fp8 import refuse_fp8\n"
        "from gpt2core.kernels import pick_kernels\n"
        "config = RunConfig.model_validate_json(sys.stdin.read())\n"
        "train, model = config.train, config.model\n"
        "if train.deterministic:\n"
        "    make_deterministic()\n"
        "try:\n"
        "    device = pick_device(train.device)\n"
        "    refuse_fp8(train, model, device)\n"
        "    dtype = pick_dtype(train.precision, device)\n"
        "    pick_kernels(train.kernels, device, dtype, model, train.precision == 'fp8')\n"
        "except ValueError as error:\n"
        "    sys.exit(str(error))\n"
        "except torch.OutOfMemoryError:\n"
        f"    sys.exit({TRY_AGAIN})\n"
    )
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, input=config.model_dump_json(), capture_output=True, text=True, check=False)
    if asked.returncode == TRY_AGAIN:
        raise BlockingIOError("another process has the GPU's memory, so that its kernels cannot be tried")
    if asked.returncode:
        raise ValueError(asked.stderr.strip().split("\n")[-1])
    return f"precision {config.train.precision}, kernels {config.train.kernels}: can be had"


def _ports(launched: LaunchConfig) -> Finding | str:
    host, _, port = (launched.rdzv_endpoint or "").rpartition(":")
    if launched.nnodes > 1 and launched.local_addr == host and (why := taken(host, int(port))):
        return Finding("ports", "error", f"rdzv_endpoint {host}:{port} ({why}): choose another port, on all machines")
    states = {name: taken("127.0.0.1", port) for name, port in PORTS.items()}
    told = [f"{name}'s {PORTS[name]} {f'in use ({why})' if why else 'free'}" for name, why in states.items()]
    return ", ".join(told) + "; one that something else uses is changed with --port"


def _packages() -> Finding | str:
    """Raises ValueError when an installed package is not of a version that this one works with."""
    try:
        needed = [Requirement(line) for line in importlib.metadata.requires("gpt2-pipeline") or []]
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "packages", "warning", "gpt2-pipeline is not installed, only on the path: `make setup` installs it"
        )
    wrong, told = [], []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        told.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, and {requirement.specifier} is needed")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: pip install --constraint constraints.txt -e .")
    return ", ".join(told)
