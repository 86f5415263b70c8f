"""Tables for people, and the checkpoints of a run in them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.storage import is_remote
from gpt2core.storage import size as file_size

NO_LIMIT = 1000  # characters, wider than any table of ours


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose numbers line up on the right; None shows as a dash. Where room is short, the first column is folded."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        made.add_column(column, justify="left" if position == 0 else "right", no_wrap=position > 0, overflow="fold")
    for row in rows:
        made.add_row(*("-" if cell is None else str(cell) for cell in row))
    return made


def show(made: Table) -> None:
    """Prints a table; where there is no terminal, as wide as it needs to be. A path in its title stays in one piece."""
    console = _console()
    title, made.title = made.title, None
    if title:
        console.print(title, style="bold", soft_wrap=True, highlight=False, markup=False)
    console.print(made)


def fits(made: Table) -> bool:
    """Whether the terminal, where there is one, is wide enough."""
    console = _console()
    needed = Measurement.get(console, console.options.update(width=NO_LIMIT), made).maximum
    return needed <= console.width


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=NO_LIMIT)


def number(value: float | None, digits: int = 4) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def age(moment: str) -> str:
    return duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()))


def require_checkpoints(folder: CheckpointFolder) -> None:
    """Raises ValueError, naming the folder, when no checkpoint file lies in it."""
    if not folder.names():
        raise ValueError(f"{folder.location} holds no checkpoints; name the run with --run_name, or give --folder")


def print_checkpoints(folder: CheckpointFolder) -> None:
    """All committed checkpoints of a folder, newest first, with what they take on disk together."""
    require_checkpoints(folder)
    rows = [
        (
            c.name,
            s.step,
            s.epoch,
            number(s.train_loss),
            number(s.val_loss),
            size(s.bytes),
            age(s.saved_at),
            s.sha256[:12],
        )
        for c in folder.all()
        for s in [c.sidecar]
    ]
    columns = ("checkpoint", "step", "epochs", "train loss", "val loss", "size", "age", "sha256")
    shared = "" if is_remote(folder.location) else " (names of one sha256 share one file)"
    title = f"{folder.location}: {size(folder.disk_bytes())} stored{shared}"
    show(table(title, columns, rows))
    for name in sorted(set(folder.names()) - {str(row[0]) for row in rows}):
        print(f"{name}.pt is no checkpoint: its sidecar is missing or does not fit")


def print_checkpoint(folder: CheckpointFolder, name: str) -> None:
    """All that the sidecar says. Raises ValueError when there is no such checkpoint."""
    require_checkpoints(folder)
    checkpoint = folder.find(name)
    if checkpoint is None:
        raise ValueError(f"{folder.location} has no whole checkpoint {name}; there are: {', '.join(folder.names())}")
    said = checkpoint.sidecar
    values = said.model_dump() | {"bytes": f"{said.bytes:,} ({size(said.bytes)})", "age": age(said.saved_at)}
    if said.train_seconds is not None:
        values["train_seconds"] = f"{said.train_seconds:,.0f} ({duration(said.train_seconds)})"
    show(table(checkpoint.location, ("", ""), values.items()))


def print_verdict(name: str, damage: str | None) -> bool:
    """One line; true when there is damage."""
    print(f"{name}: {f'DAMAGED, {damage}' if damage else 'whole'}", flush=True)
    return damage is not None


def print_disk_use(folder: CheckpointFolder) -> None:
    """What each tier would take alone, and what all take together, with shared files counted once."""
    require_checkpoints(folder)
    tiers: dict[str, list[int]] = {}
    for name in folder.names():
        tier = name.rstrip("0123456789").removesuffix("_step_").rstrip("_")
        tiers.setdefault(tier, []).append(file_size(folder.file(name)))
    rows = [(tier, len(sizes), size(sum(sizes))) for tier, sizes in tiers.items()]
    together = size(folder.disk_bytes())
    show(table(f"{folder.location}: {together} stored", ("tier", "files", "size"), rows))
