"""A tiny dataset and tiny runs, made once a session by real processes and shared by the tests that look at them.

`make test` runs files beside each other (pytest-xdist): what is made once is made once for all of its workers.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from orchestration import Orchestration
from servers import http_files, hub, s3, s3_server  # noqa: F401  fixtures

from gpt2core.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from gpt2core.launch import KEEP_FREED_MEMORY
from gpt2core.run_folder import RunFolder

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test is first
# Ranks and tests run beside each other: a thread each, in this process and in all that it starts.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores it, and so would its children

REPOSITORY = Path(__file__).resolve().parent.parent
SHAKESPEARE = REPOSITORY / "data" / "sample" / "tinyshakespeare.txt"
HELLASWAG = REPOSITORY / "data" / "sample" / "hellaswag_sample.jsonl"

DEADLINE_S = 120.0  # for any one event or process; only a hang comes near it
STEPS_PER_EPOCH, MAX_STEPS = 12, 24
SETTINGS: dict[str, Any] = {
    "context_length": 32,
    "num_layers": 2,
    "embd_size": 32,
    "num_heads": 2,
    "total_batch_size": 256,
    "mini_batch_size": 2,
    "num_epochs": 2,
    "steps_per_epoch": STEPS_PER_EPOCH,
    "warmup_steps": 2,
    "eval_freq": 3,
    "checkpoint_freq": 2,
    "keep_checkpoints": 3,
    "hellaswag_freq": 0,
    "sample_freq": 0,
    "histogram_freq": 0,
    "val_tokens": 512,
    "device": "cpu",
}
TRAINER_ENVIRONMENT = KEEP_FREED_MEMORY | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def wait_until(happened: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `happened`; fails the test when the deadline passes."""
    deadline = time.monotonic() + deadline_s
    while not (value := happened()):
        assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s for {what}"
        time.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children and so on."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        todo += children
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def logged(run: Path, name: str) -> dict[int, float]:
    """Step -> value of one number; fails when a step has it twice."""
    pairs = [(line["step"], line[name]) for line in metrics(run) if name in line]
    assert len(dict(pairs)) == len(pairs), f"{name} is logged twice for a step: {pairs}"
    return dict(pairs)


class Started:
    """A process that a test started, and those that it started in turn."""

    def __init__(self, process: subprocess.Popen[bytes], run: Path, output_file: Path) -> None:
        self.process, self.run, self.output_file = process, run, output_file
        self.seen: set[int] = set()

    @property
    def output(self) -> str:
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, happened: Callable[[], Any], what: str) -> Any:
        def look() -> Any:
            value = happened()
            assert value or self.process.poll() is None, f"it ended before {what}:\n{self.output}"
            return value

        return wait_until(look, f"{what}; so far:\n{self.output}")

    def wait_for_step(self, step: int) -> None:
        self.wait_for(
            lambda: any(line["step"] >= step and "loss" in line for line in metrics(self.run)), f"step {step}"
        )

    def children(self) -> list[int]:
        found = descendants(self.process.pid)
        self.seen |= set(found)
        return found

    def rank(self, number: int) -> int:
        """Process id of a torchrun rank."""
        wanted = f"RANK={number}".encode()
        return next(pid for pid in self.children() if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def kill_everything(self) -> None:
        for pid in [self.process.pid, *self.children()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        return self.process.wait(deadline_s)

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.process.poll() is None:
            self.kill_everything()
        for pid in self.seen:
            if is_alive(pid) and b"gpt2core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


class Lab:
    """How the tests start things."""

    source, hellaswag = SHAKESPEARE, HELLASWAG
    deadline_s = DEADLINE_S
    steps_per_epoch, max_steps = STEPS_PER_EPOCH, MAX_STEPS
    wait_until = staticmethod(wait_until)
    is_alive = staticmethod(is_alive)
    descendants = staticmethod(descendants)
    metrics = staticmethod(metrics)
    logged = staticmethod(logged)

    def __init__(self, root: Path, shared: Path) -> None:
        self.root = root  # of this worker
        self.shared, self.data_dir = shared, shared / "data"  # of all of them: look, do not touch

    def flags(self, artifacts_dir: Path, **changes: Any) -> list[str]:
        """Flags of the tiny run, named `tiny`; `changes` to a setting, or None to leave one out."""
        settings = {"data_dir": self.data_dir, "artifacts_dir": artifacts_dir, "run_name": "tiny"} | SETTINGS | changes
        return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]

    def parameters(self, artifacts_dir: Path, run_name: str = "tiny", **changes: Any) -> dict[str, Any]:
        """The same run as parameters of the deployment train/gpt2-124m, in two processes."""
        settings = {"data_dir": str(self.data_dir)} | SETTINGS | changes
        groups = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "evaluation": EvalConfig}
        of_groups = {
            group: {name: value for name, value in settings.items() if name in model.model_fields}
            for group, model in groups.items()
        }
        start = {"run_name": run_name, "artifacts_dir": str(artifacts_dir), "launch": {"nproc_per_node": 2}}
        return start | of_groups

    def command(self, module: str, arguments: list[str], nproc: int = 1) -> list[str]:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", "-m"] if nproc > 1 else []
        return [sys.executable, "-m", *torchrun, module, *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name != "GPT2_STARTED_BY"} | TRAINER_ENVIRONMENT

    def run(
        self, module: str, arguments: list[str], nproc: int = 1, deadline_s: float = DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a module of the package to its end."""
        return self.run_command(self.command(module, arguments, nproc), deadline_s)

    def run_command(
        self, command: list[str], deadline_s: float = DEADLINE_S, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self.environment() | environment,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def train(
        self, flags: list[str], nproc: int = 1, deadline_s: float = DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Trains to the end of the run or of what the flags say; fails the test when that fails."""
        done = self.run("gpt2core.train", flags, nproc, deadline_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    @contextmanager
    def started(
        self,
        run: Path,
        arguments: list[str],
        nproc: int = 1,
        module: str = "gpt2core.train",
        limit_file_bytes: int = resource.RLIM_INFINITY,
    ) -> Iterator[Started]:
        """Starts a module for as long as the block lasts; its output goes to a file.

        A write that makes a file longer than `limit_file_bytes` fails, as it would on a full disk.
        """
        output_file = self.root / f"output_{time.monotonic_ns()}.txt"
        with output_file.open("wb") as output:
            process = subprocess.Popen(
                self.command(module, arguments, nproc),
                cwd=REPOSITORY,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_file_bytes, resource.RLIM_INFINITY))
        started = Started(process, run, output_file)
        try:
            yield started
        finally:
            started.end()

    def examples(self, count: int) -> Path:
        """So many of the bundled HellaSwag, few enough to be quick on a CPU."""
        path = self.root / f"hellaswag_{count}.jsonl"
        lines = self.hellaswag.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:count]), encoding="utf-8")
        return path

    def copy_run(self, run: Path, artifacts_dir: Path, name: str = "tiny") -> Path:
        """The run under another artifacts folder; checkpoint files are linked, for nobody writes into one."""

        def link_or_copy(source: str, target: str) -> None:
            (os.link if source.endswith(".pt") else shutil.copy2)(source, target)

        return Path(shutil.copytree(run, artifacts_dir / name, copy_function=link_or_copy))

    def load(self, path: Path) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

    def assert_same(self, mine: Any, other: Any, where: str = "") -> None:
        """Bit for bit the same nested state."""
        assert type(mine) is type(other), where
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other), where
        elif isinstance(mine, dict):
            assert mine.keys() == other.keys(), where
            for key in mine:
                self.assert_same(mine[key], other[key], f"{where}/{key}")
        elif isinstance(mine, list | tuple):
            assert len(mine) == len(other), where
            for position, pair in enumerate(zip(mine, other, strict=True)):
                self.assert_same(*pair, f"{where}/{position}")
        else:
            assert mine == other, where

    def latest(self, run: Path) -> dict[str, Any]:
        """The content of latest.pt, wherever the run has its checkpoints."""
        with fsspec.open(f"{RunFolder(run.parent, run.name).checkpoints}/latest.pt") as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    def assert_same_end(self, run: Path, other: Path, max_steps: int = MAX_STEPS) -> None:
        """Two finished runs ended in the same state and logged the same training losses, each step once."""
        names = ["step", "epoch", "tokens_seen", "train_loss", "val_loss", "best_val_loss"]
        names += ["model", "optimizer", "rng", "data"]
        mine, others = self.latest(run), self.latest(other)
        self.assert_same({name: mine[name] for name in names}, {name: others[name] for name in names})
        assert logged(run, "loss") == logged(other, "loss")
        assert list(logged(run, "loss")) == list(range(1, max_steps + 1))

    def assert_same_run(self, run: Path, other: Path, max_steps: int = MAX_STEPS) -> None:
        """Two finished runs ended in the same state and logged the same numbers, each step once."""
        self.assert_same_end(run, other, max_steps)
        for name in ("lr", "grad_norm", "val_loss"):
            assert logged(run, name) == logged(other, name), name


def made_once(folder: Path, make: Callable[[], object]) -> Path:
    """The folder, made by the first of the workers that needs it."""
    folder.parent.mkdir(exist_ok=True)
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            make()
            made.touch()
    return folder


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    lab = Lab(tmp_path_factory.mktemp("lab"), session / "shared")
    source = ["--source", SHAKESPEARE, "--data_dir", lab.data_dir, "--shard_size", 32_768]

    def prepare() -> None:
        done = lab.run("gpt2core.cli", ["prepare", *source])
        assert done.returncode == 0, done.stderr

    made_once(lab.data_dir, prepare)
    return lab


@pytest.fixture(scope="session")
def orchestration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestration]:
    """A Prefect server with all deployments; a test that starts a worker ends it."""
    started = Orchestration(tmp_path_factory.mktemp("orchestration"))
    try:
        started.start_server()
        started.deploy()
        yield started
    finally:
        started.end()


@pytest.fixture(scope="session")
def other_data_dir(lab: Lab) -> Path:
    """Another dataset, as build-nanogpt leaves it: shards and no manifest."""
    folder = lab.root / "other_data"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 50257, size=(2, 8192)).astype(np.uint16)
    np.save(folder / "edufineweb_val_000000.npy", tokens[0])
    np.save(folder / "edufineweb_train_000001.npy", tokens[1])
    return folder


def trained_once(lab: Lab, name: str, *flags: str, nproc: int = 1) -> Path:
    artifacts = lab.shared / name
    return made_once(artifacts, lambda: lab.train([*lab.flags(artifacts), *flags], nproc)) / "tiny"


@pytest.fixture(scope="session")
def straight(lab: Lab) -> Path:
    """A whole run in one process, without a stop. Look, do not touch: copy_run makes one to work on."""
    return trained_once(lab, "straight")


@pytest.fixture(scope="session")
def straight_two_ranks(lab: Lab) -> Path:
    return trained_once(lab, "straight_two_ranks", nproc=2)


@pytest.fixture(scope="session")
def first_epoch(lab: Lab) -> Path:
    """The same run, stopped at the end of its first epoch."""
    return trained_once(lab, "first_epoch", "--stop_epoch", "1")


@pytest.fixture(scope="session")
def first_epoch_two_ranks(lab: Lab) -> Path:
    return trained_once(lab, "first_epoch_two_ranks", "--stop_epoch", "1", nproc=2)


@pytest.fixture
def train_here() -> Iterator[Callable[[list[str]], None]]:
    """`python -m gpt2core.train` inside this process: quicker, for tests of what it says and raises."""
    from gpt2core.train import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    yield lambda flags: main([str(flag) for flag in flags])
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)
