"""Where everything of a run lies. No torch in here: flows read it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2core.config import RunConfig, differences
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

        self._config: RunConfig | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        folder = cls(config.artifacts_dir, config.run_name)
        folder._config = config
        return folder

    @property
    def checkpoints(self) -> str:
        """Path or URL of the checkpoint folder, as the configuration that the run was started with has it."""
        config = self._config
        if config is None and self.config_file.exists():
            config = read_config(self.config_file)
        elsewhere = config.train.checkpoint_dir if config else None
        return join(elsewhere, self.path.name) if elsewhere else str(self.path / "checkpoints")

    def claim(self, config: RunConfig, force: bool = False) -> None:
        """Writes config.json, after a check that it does not contradict the run that lies here.

        Raises ValueError, naming each difference, when a setting that shapes the run has changed and not `force`.
        """
        if (
            self.config_file.exists()
            and any(name.endswith(".pt") for name in file_sizes(self.checkpoints))
            and not force
        ):
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
