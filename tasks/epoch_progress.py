"""How far an epoch is, live in the UI, out of the lines that the trainer prints."""

from __future__ import annotations

from gpt2core.log_line import parse, seconds_of, short_duration
from tasks.artifacts import LiveProgress, artifact_key

SECONDS_BETWEEN_UPDATES = 15.0


class EpochProgress:
    """The bar of an epoch; `look` takes every line of the trainer."""

    def __init__(self, run_name: str, epoch: int, num_epochs: int) -> None:
        self.epoch, self.num_epochs = epoch, num_epochs
        self.bar = LiveProgress(artifact_key("training", run_name), f"epoch {epoch}", SECONDS_BETWEEN_UPDATES)
        self.seen: dict[str, str] = {}  # the newest of each number

    def look(self, line: str) -> None:
        if words := parse(line):
            self.seen |= words
            if "loss" in words and self.bar.due():
                self.bar.show(self.percent(), self.describe())

    def finish(self, failed: bool = False) -> None:
        if self.seen:
            self.bar.finish(self.percent(), ("failed after " if failed else "") + self.describe())

    def percent(self) -> float:
        step, _, before = self._steps()
        return 100 * min(1.0, max(0.0, (step - before) / max(1.0, self._per_epoch())))

    def describe(self) -> str:
        step, last, before = self._steps()
        numbers = [f"{name} {self.seen[name]}" for name in ("loss", "val_loss", "acc_norm") if name in self.seen]
        speed = [f"{float(self.seen['tokens_per_sec']):,.0f} tokens/s"] if "tokens_per_sec" in self.seen else []
        said = ", ".join([f"epoch {self.epoch} of {self.num_epochs}", f"step {step:,} of {last:,}", *numbers, *speed])
        if "eta" not in self.seen or last <= step:
            return said
        eta_s = seconds_of(self.seen["eta"])
        of_epoch = eta_s * max(0.0, before + self._per_epoch() - step) / (last - step)
        return f"{said}; to go: epoch {short_duration(of_epoch)}, run {short_duration(eta_s)}"

    def _per_epoch(self) -> float:
        return self._steps()[1] / self.num_epochs

    def _steps(self) -> tuple[int, int, float]:
        """This step, the last of the run, and the last of the epoch before."""
        step, last = int(self.seen.get("step", 0)), int(self.seen.get("of", 0))
        return step, last, (self.epoch - 1) * last / self.num_epochs
