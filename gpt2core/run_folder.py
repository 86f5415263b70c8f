"""Where everything of a run lies, and files that appear whole or not at all. No torch in here: flows read it too."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2core.config import RunConfig, differences
from gpt2core.flags import read_config


class RunFolder:
    """artifacts/<run_name>/: config.json, checkpoints/, tensorboard/, logs/log.txt, metrics.jsonl."""

    def __init__(self, artifacts_dir: str | Path, run_name: str) -> None:
        self.path = Path(artifacts_dir) / run_name
        self.config_file = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.log_file = self.path / "logs" / "log.txt"
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations"
        self.promotion_file = self.path / "promotion.json"  # the last decision on this run
        self.reports = self.path / "reports"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        return cls(config.artifacts_dir, config.run_name)

    def claim(self, config: RunConfig, force: bool = False) -> None:
        """Writes config.json, after a check that it does not contradict the run that lies here.

        Raises ValueError, naming each difference, when a setting that shapes the run has changed and not `force`.
        """
        if self.config_file.exists() and any(self.checkpoints.glob("*.pt")) and not force:
            changed = differences(read_config(self.config_file), config)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}): "
                    f"give another --run_name, the same settings, or --force to go on with the new ones"
                )
        if not self.config_file.exists() or self.config_file.read_text(encoding="utf-8") != _to_json(config):
            write_text(self.config_file, _to_json(config))

    def metrics(self) -> list[dict[str, Any]]:
        """All that was logged, in order; a last line that a crash cut short is left out."""
        return list(read_json_lines(self.metrics_file))


def _to_json(config: RunConfig) -> str:
    return config.model_dump_json(indent=2) + "\n"


@contextmanager
def publish(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that appears under its name only when complete and on disk; an error leaves what was there.

    Written to a temporary name beside it, fsynced, renamed, and the folder fsynced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    with publish(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def fsync_folder(path: Path) -> None:
    """Puts a rename in this folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; what a crash cut short is left out, with what was appended to it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
