"""The mini-batch at which a GPU's memory ran out in training, kept in the run's folder: the next start takes fewer sequences.

No torch in here: `gpt2 train` asks, too, to start again.
"""

from __future__ import annotations

from pydantic import ValidationError

from gpt2core.config import Positive
from gpt2core.records import Record
from gpt2core.run_folder import RunFolder
from gpt2core.storage import write_text


class TooMany(Record):
    mini_batch_size: Positive


def too_many_sequences(folder: RunFolder) -> int | None:
    """None where memory never ran out. Raises ValueError, naming the file, when something else lies in its place."""
    file = folder.too_many_file
    try:
        return TooMany.model_validate_json(file.read_bytes()).mini_batch_size
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError(f"{file} does not say at which mini_batch_size memory ran out: remove it") from None


def rule_out(folder: RunFolder, mini_batch_size: int) -> None:
    """Keeps in mind that memory ran out with so many sequences."""
    write_text(folder.too_many_file, TooMany(mini_batch_size=mini_batch_size).model_dump_json() + "\n")
