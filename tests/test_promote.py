"""Which model artifacts/best/ holds: only a strictly better one, and it is the one that was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import VOCAB_SIZE, ModelConfig
from gpt2core.model import GPT
from gpt2core.promote import describe, judge, promote
from gpt2core.records import Contender, Evaluation, current_best


def contender(val_loss: float, fingerprint: str = "same", **changes: Any) -> Contender:
    fields = {"run_name": "a", "checkpoint": "latest", "step": 1, "val_loss": val_loss, "val_fingerprint": fingerprint}
    return Contender.model_validate(fields | {"val_tokens": 1024} | changes)


def record(run: Path, checkpoint: str, val_loss: float, **changes: Any) -> None:
    """Writes the measurement of a checkpoint as the evaluate stage does."""
    found = CheckpointFolder(run / "checkpoints").find(checkpoint)
    assert found
    evaluation = Evaluation(
        run_name=run.name,
        checkpoint=checkpoint,
        sha256=found.sidecar.sha256,
        step=found.sidecar.step,
        epoch=found.sidecar.epoch,
        val_loss=val_loss,
        perplexity=1.0,
        val_tokens=1024,
        val_fingerprint="same",
        hellaswag=None,
        duration_s=1.0,
        measured_at="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    (folder / f"step_{evaluation.step:06d}.json").write_text(json.dumps(evaluation.model_dump()))


def history(artifacts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifacts / "promoted" / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return lab.copy_run(straight, tmp_path)


@pytest.fixture
def other_run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return lab.copy_run(straight, tmp_path, name="other")


@pytest.mark.parametrize(
    ("candidate", "holder", "promoted", "reason"),
    [
        (contender(3.0), None, True, "first to be promoted"),
        (contender(3.0), contender(3.1), True, "better: val_loss 3.0000 against 3.1000"),
        (contender(3.0), contender(3.0), False, "a tie"),
        (contender(3.0, step=9), contender(3.0), False, "a tie"),
        (contender(3.1), contender(3.0), False, "not better"),
        (contender(3.0, "one"), contender(3.1, "another"), False, "other validation data"),
        (contender(3.0, "one"), contender(3.0, "another"), False, "other validation data"),
        (contender(float("nan")), contender(3.0), False, "not better"),
    ],
)
def test_judge(candidate: Contender, holder: Contender | None, promoted: bool, reason: str) -> None:
    verdict, why = judge(candidate, holder)
    assert verdict is promoted
    assert reason in why


def test_the_first_is_promoted_and_the_same_again_is_a_tie(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    first = promote(run.parent, "tiny")
    assert first.promoted and first.beaten is None
    assert first.candidate.step == 12
    assert current_best(run.parent) == first.candidate
    target = (run.parent / "best").resolve()
    again = promote(run.parent, "tiny")
    assert not again.promoted and "tie" in again.reason
    assert (run.parent / "best").resolve() == target
    assert describe(again).startswith("kept what is best")
    assert len(history(run.parent)) == 1  # the same question asked again is no news


def test_better_replaces_and_worse_does_not(run: Path, other_run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    record(other_run, "epoch_00001", 3.6)
    worse = promote(run.parent, "other")
    assert not worse.promoted and "not better" in worse.reason
    assert current_best(run.parent).run_name == "tiny"  # type: ignore[union-attr]
    record(other_run, "epoch_00002", 3.4)
    better = promote(run.parent, "other")
    assert better.promoted
    assert better.beaten and (better.beaten.run_name, better.beaten.val_loss) == ("tiny", 3.5)
    best = current_best(run.parent)
    assert best and (best.run_name, best.step, best.val_loss) == ("other", 24, 3.4)
    assert [(line["promoted"], line["candidate"]["val_loss"]) for line in history(run.parent)] == [
        (True, 3.5),
        (False, 3.6),
        (True, 3.4),
    ]
    assert len(list((run.parent / "promoted").glob("00*"))) == 2  # the one before is still there to go back to


def test_the_runs_candidate_is_the_lowest_loss_measured(run: Path) -> None:
    record(run, "epoch_00001", 3.4)
    record(run, "epoch_00002", 3.5)
    decision = promote(run.parent, "tiny")
    assert (decision.candidate.step, decision.candidate.val_loss) == (12, 3.4)


def test_nan_is_never_promoted(run: Path) -> None:
    record(run, "epoch_00001", 0.0)
    file = run / "evaluations" / "step_000012.json"
    file.write_text(file.read_text().replace('"val_loss": 0.0', '"val_loss": NaN'))
    with pytest.raises(ValueError, match="no measured checkpoint"):
        promote(run.parent, "tiny")
    assert not (run.parent / "best").exists()
    record(run, "epoch_00002", 3.5)
    assert promote(run.parent, "tiny").candidate.step == 24


def test_other_validation_data_is_not_compared(run: Path, other_run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    record(other_run, "epoch_00001", 1.0, val_fingerprint="easier")
    decision = promote(run.parent, "other")
    assert not decision.promoted and "other validation data" in decision.reason
    assert current_best(run.parent).run_name == "tiny"  # type: ignore[union-attr]


def test_fewer_tokens_of_the_same_data_are_other_validation_data(run: Path, other_run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    record(other_run, "epoch_00001", 3.4, val_tokens=32)  # one lucky sequence
    decision = promote(run.parent, "other")
    assert not decision.promoted, decision.reason


def test_a_measurement_on_easier_data_does_not_hide_the_comparable_one(run: Path, other_run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    record(other_run, "epoch_00001", 1.0, val_fingerprint="easier")
    record(other_run, "epoch_00002", 3.4)
    decision = promote(run.parent, "other")
    assert decision.promoted, decision.reason
    assert decision.candidate.val_loss == 3.4


def test_without_a_measured_checkpoint_it_is_an_error_that_says_what_to_run(run: Path) -> None:
    with pytest.raises(ValueError, match=r"no measured checkpoint.*gpt2 evaluate --run_name tiny --checkpoint best"):
        promote(run.parent, "tiny")


def test_a_measurement_of_weights_that_are_gone_does_not_count(run: Path) -> None:
    record(run, "epoch_00001", 3.5, sha256="0" * 64)
    with pytest.raises(ValueError, match="no measured checkpoint"):
        promote(run.parent, "tiny")


def test_a_broken_evaluation_file_is_named(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    (run / "evaluations" / "step_000024.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_000024\.json is no evaluation"):
        promote(run.parent, "tiny")


def test_a_damaged_checkpoint_is_not_promoted(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    for path in (run / "checkpoints").glob("*.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        promote(run.parent, "tiny")
    assert not (run.parent / "best").exists()


def test_what_is_promoted_is_the_measured_model_as_transformers_loads_it(run: Path, lab: Any) -> None:
    import transformers

    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    best = run.parent / "best"
    checkpoint = lab.load(run / "checkpoints" / "epoch_00001.pt")
    ours = GPT(ModelConfig.model_validate(checkpoint["config"]["model"]))
    ours.load_state_dict(checkpoint["model"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    tokens = tokenizer("First Citizen: Before we proceed any further", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = ours.eval()(tokens)[..., :VOCAB_SIZE]
        logits = theirs(tokens).logits
    assert logits.shape == expected.shape
    assert torch.allclose(logits, expected, atol=1e-4, rtol=0)
    assert json.loads((best / "evaluation.json").read_text())["val_loss"] == 3.5
    assert json.loads((best / "training_config.json").read_text()) == checkpoint["config"]


def test_the_promoted_model_outlives_its_run(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    shutil.rmtree(run)
    assert (run.parent / "best" / "model.safetensors").stat().st_size > 0
