"""What rank 0 writes while it trains: metrics.jsonl for programs, logs/log.txt for people, TensorBoard for curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

from torch import nn

from gpt2core.board import Board
from gpt2core.launch import tell
from gpt2core.log_line import step_line
from gpt2core.run_folder import RunFolder
from gpt2core.storage import write_text


class MetricsLog:
    """Appends to the three logs of a run. Opened to resume at a step, it drops what a crashed attempt logged beyond."""

    def __init__(self, folder: RunFolder, *, resume_at: int | None, board: Board | None = None) -> None:
        self._warned = False
        self._board = board
        folder.log_file.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None:  # else another process may be writing it: only append
            # a run that starts afresh measures step 0 again
            kept = [line for line in folder.metrics(lenient=True) if line["step"] <= resume_at and resume_at]
            write_text(folder.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = folder.metrics_file.open("a", encoding="utf-8", buffering=1)
        self._text = folder.log_file.open("a", encoding="utf-8", buffering=1)

    def say(self, message: str) -> None:
        """One line to the terminal and to log.txt."""
        tell(self.note(message))

    def note(self, message: str) -> str:
        """One line to log.txt alone; returns it."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}"
        self._keep_going(lambda: self._text.write(line + "\n"))
        return line

    def numbers(self, step: int, **values: float) -> None:
        """One measurement to all three: 'step=250 loss=3.2118 lr=0.00035', the same names in metrics.jsonl."""
        self._keep_going(lambda: self._metrics.write(json.dumps({"step": step, **values}) + "\n"))
        self.say(step_line(step, values))
        self._on_board(lambda board: board.scalars(step, values))

    def samples(self, step: int, texts: list[str]) -> None:
        for text in texts:
            self.say(f"step={step} sample: {text!r}")
        self._on_board(lambda board: board.samples(step, texts))

    def histograms(self, step: int, model: nn.Module) -> None:
        self._on_board(lambda board: board.histograms(step, model))

    def finish(self, step: int, results: dict[str, float]) -> None:
        """To be called at the end of the run, with what it came to."""
        self._on_board(lambda board: board.finish(step, results))

    def flush(self) -> None:
        """Leaves nothing in buffers: a checkpoint that is whole shall never be ahead of the curves."""
        self._on_board(lambda board: board.flush())

    def close(self) -> None:
        for file in (self._metrics, self._text, self._board):
            if file:
                self._keep_going(file.close)

    def _on_board(self, write: Callable[[Board], object]) -> None:
        if board := self._board:
            self._keep_going(lambda: write(board))

    def _keep_going(self, write: Callable[[], object]) -> None:
        """A log that cannot be written (a full disk) is a warning, once, and no reason to stop training."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                tell(f"WARNING: the logs cannot be written ({error}): training goes on without them")
            self._warned = True
