"""Where everything of a run lies. No torch in here: flows read it too."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path
from typing import Any

from gpt2core.checkpoint_folder import LATEST, CheckpointFolder
from gpt2core.config import RunConfig, TrainConfig, differences
from gpt2core.flags import read_config
from gpt2core.storage import file_sizes, join, read_json_lines, write_text


class RunFolder:
    """artifacts/<run_name>/: config.json, checkpoints/, tensorboard/, logs/log.txt, metrics.jsonl."""

    def __init__(self, artifacts_dir: str | Path, run_name: str) -> None:
        self.path = Path(artifacts_dir) / run_name
        self.config_file = self.path / "config.json"
        self.tensorboard = self.path / "tensorboard"
        self.log_file = self.path / "logs" / "log.txt"
        self.output_file = self.path / "logs" / "output.txt"  # all that the ranks printed under the pipeline
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations"
        self.promotion_file = self.path / "promotion.json"  # the last decision on this run
        self.reports = self.path / "reports"
        self.attempts_file = self.path / "attempts.json"
        self.starts_file = self.path / "starts.json"
        self.heartbeat_file = self.path / "heartbeat.json"
        self.too_many_file = self.path / "too_many_sequences.json"  # for the memory of this machine's GPUs

        self.last_step: float = math.inf  # numbers beyond it are left out
        self._config: RunConfig | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        folder = cls(config.artifacts_dir, config.run_name)
        folder._config = config
        return folder

    def until(self, step: int) -> RunFolder:
        """The same folder as it was at this step, for who reads its numbers."""
        earlier = copy(self)
        earlier.last_step = step
        return earlier

    @property
    def checkpoints(self) -> str:
        """Path or URL of the checkpoint folder, as the configuration that the run was started with has it."""
        config = self._config
        if config is None and self.config_file.exists():
            config = read_config(self.config_file)
        elsewhere = config.train.checkpoint_dir if config else None
        return join(elsewhere, self.path.name) if elsewhere else str(self.path / "checkpoints")

    def claim(self, config: RunConfig, force: bool = False, epochs_done: float | None = None) -> None:
        """Writes config.json, after a check that it does not contradict the run that lies here, `epochs_done` of which
        are done, by default those of its latest checkpoint.

        Raises ValueError, naming each difference, when a setting that shapes the run has changed and not `force`. The
        length of a run that is before its decay may change.
        """
        if (
            self.config_file.exists()
            and any(name.endswith(".pt") for name in file_sizes(self.checkpoints))
            and not force
        ):
            changed = differences(self._begun(config.train, epochs_done), config)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}): "
                    f"give another --run_name, the same settings, or --force to go on with the new ones"
                )
        if not self.config_file.exists() or self.config_file.read_text(encoding="utf-8") != _to_json(config):
            write_text(self.config_file, _to_json(config))

    def was_claimed_for(self, optimizer: str) -> bool:
        """Whether config.json is there and names this optimizer."""
        return self.config_file.exists() and read_config(self.config_file).train.optimizer == optimizer

    def _begun(self, wanted: TrainConfig, epochs_done: float | None) -> RunConfig:
        """The configuration in config.json, with the wanted length where that changes nothing of what is done."""
        begun = read_config(self.config_file)
        if begun.train.precision == "fp8" and "fp8_gradients" not in begun.train.model_fields_set:
            before_the_setting = {"fp8_gradients": "e5m2"}
            begun = begun.model_copy(update={"train": begun.train.model_copy(update=before_the_setting)})
        if begun.train.lr_schedule != "wsd":
            return begun
        if epochs_done is None:
            latest = CheckpointFolder(self.checkpoints).find(LATEST)
            epochs_done = latest.sidecar.epochs_done if latest else math.inf
        if not (begun.train.is_before_decay(epochs_done) and wanted.is_before_decay(epochs_done)):
            return begun
        end = {name: getattr(wanted, name) for name in ("num_epochs", "decay_epochs", "min_lr")}
        return begun.model_copy(update={"train": begun.train.model_copy(update=end)})

    def metrics(self, lenient: bool = False) -> list[dict[str, Any]]:
        """All that was logged, in order; a last line that a crash cut short is left out.

        Raises ValueError, naming the file, when there is something else in it than measurements; `lenient` leaves that out.
        """
        lines = list(read_json_lines(self.metrics_file, lenient))
        stray = [line for line in lines if not isinstance(line.get("step"), int)]
        if stray and not lenient:
            raise ValueError(f"{self.metrics_file}: {stray[0]!r:.80} says no step; take the line out")
        return [line for line in lines if line not in stray and line["step"] <= self.last_step]


def _to_json(config: RunConfig) -> str:
    return config.model_dump_json(indent=2) + "\n"
