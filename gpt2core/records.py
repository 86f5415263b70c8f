"""What the stages leave behind, as JSON files that people and other stages read. No torch in here."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gpt2core.config import Rule
from gpt2core.storage import Location, join, read_text


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Stage(Record):
    """One stage as it went, for the table at the end of a pipeline."""

    stage: str
    duration_s: float
    note: str = ""
    step: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    acc: float | None = None
    acc_norm: float | None = None
    tokens_per_sec: float | None = None


Convention = Literal["build-nanogpt", "lm-eval"]  # of HellaSwag; gpt2core.hellaswag says what they are


class HellaSwagScore(Record):
    """Shares of right answers with their standard errors; NaN when the model gave no finite losses."""

    convention: Convention = "build-nanogpt"
    source: str | None = None  # of the examples
    fingerprint: str | None = None  # of the examples
    examples: int
    truncated: int = 0  # examples of which an ending saw only the end of its context: the model cannot read all of it
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    right_by_acc_norm: str | None = None  # each answer, as `pack` has them; older records have none

    @model_validator(mode="after")
    def _answers_are_those_of_the_share(self) -> Self:
        if self.right_by_acc_norm is not None:
            right = unpack(self.right_by_acc_norm)
            if right.bit_length() > self.examples or abs(right.bit_count() - self.acc_norm * self.examples) > 0.5:
                raise ValueError("right_by_acc_norm does not have as many right answers as acc_norm says")
        return self

    def gained_and_lost(self, other: HellaSwagScore) -> tuple[int, int] | None:
        """How many examples acc_norm has right here and wrong there, and the other way round; None when one of the two
        did not keep its answers. Both must be of the same examples."""
        if self.right_by_acc_norm is None or other.right_by_acc_norm is None:
            return None
        mine, others = unpack(self.right_by_acc_norm), unpack(other.right_by_acc_norm)
        return (mine & ~others).bit_count(), (others & ~mine).bit_count()


def pack(answers: Iterable[bool]) -> str:
    """A bit an answer, in base64: 1,676 characters for HellaSwag's 10,042 examples."""
    number = sum(1 << place for place, answer in enumerate(answers) if answer)
    return b64encode(number.to_bytes((number.bit_length() + 7) // 8, "little")).decode()


def unpack(packed: str) -> int:
    """The answers as bits of a number, the first one the lowest. Raises ValueError when it is no base64."""
    return int.from_bytes(b64decode(packed, validate=True), "little")


class Evaluation(Record):
    """One checkpoint, measured: evaluations/step_XXXXXX.json."""

    run_name: str
    checkpoint: str
    sha256: str | None  # of the checkpoint's content
    step: int
    epoch: int
    val_loss: float  # nats a token
    val_loss_stderr: float | None = None  # over sequences
    perplexity: float
    bits_per_byte: float | None = None  # of the text, <|endoftext|> left out
    val_tokens: int
    val_fingerprint: str
    hellaswag: HellaSwagScore | None  # by build-nanogpt's convention
    hellaswag_lm_eval: HellaSwagScore | None = None
    duration_s: float
    measured_at: str  # UTC, ISO 8601


class CodeVersion(Record):
    """The code that did something."""

    version: str  # of the package
    commit: str | None = None  # when it ran from a git checkout
    dirty: bool | None = None  # whether tracked files differed from the commit


class Contender(Record):
    """A checkpoint as promotion sees it."""

    run_name: str
    checkpoint: str
    step: int
    val_loss: float
    val_fingerprint: str
    val_tokens: int
    sha256: str | None = None  # of the checkpoint's content
    hellaswag: HellaSwagScore | None = None

    def number(self, rule: Rule) -> float | None:
        """What the rule compares, None when it was not measured."""
        if rule == "val_loss":
            return self.val_loss
        return self.hellaswag.acc_norm if self.hellaswag else None

    def compares_with(self, other: Contender, rule: Rule = "val_loss") -> bool:
        """Whether both have the rule's number, measured on the same data."""
        if rule == "val_loss":
            return (self.val_fingerprint, self.val_tokens) == (other.val_fingerprint, other.val_tokens)
        mine, others = self.hellaswag, other.hellaswag
        if mine is None or others is None:
            return False
        return (mine.fingerprint, mine.examples, mine.convention) == (
            others.fingerprint,
            others.examples,
            others.convention,
        )


class Promotion(Record):
    """One decision on what artifacts/best/ holds: promotion.json beside the model, and a line in history.jsonl."""

    action: Literal["promote", "rollback"] = "promote"
    promoted: bool
    reason: str
    rule: Rule = "val_loss"
    candidate: Contender  # what it is about; of a rollback, what is best again
    beaten: Contender | None  # what was best before
    better_by: float | None = None  # lower loss or higher acc_norm than the beaten
    stderr: float | None = None  # of that difference, where it is known
    paired: bool | None = None  # whether that is of the same examples' answers, and not of two independent samples
    version: str | None = None  # folder under promoted/ that is best by this decision
    replaced: str | None = None  # folder that was best before
    train_fingerprint: str | None = None  # of the shards that it was trained on
    trained_with: CodeVersion | None = None
    promoted_with: CodeVersion | None = None
    decided_at: str  # UTC, ISO 8601


class Published(Record):
    """best.json at the place of publication, written last: which folder beside it holds the promoted model."""

    folder: str
    candidate: Contender
    published_at: str  # UTC, ISO 8601


PUBLISHED = "best.json"


def published_at(location: Location) -> Published | None:
    """What was published at a path or URL, None when nothing was."""
    pointer = join(location, PUBLISHED)
    try:
        return Published.model_validate_json(read_text(pointer))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{pointer} does not say what is published there: publish again") from None


def read_promotion(file: Path) -> Promotion | None:
    """The decision in a promotion.json, None when there is no such file. Raises ValueError, naming it, when damaged."""
    try:
        return Promotion.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError(f"{file} is no promotion record: restore it, or move it away") from None


def current_best(artifacts: Path) -> Contender | None:
    """What artifacts/best/ holds, None when nothing was promoted yet. Raises ValueError when its record is damaged."""
    decision = read_promotion(artifacts / "best" / "promotion.json")
    return decision.candidate if decision else None
