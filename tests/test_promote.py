"""Which candidate is promoted: only a strictly better one, by the numbers of the rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from promotions import answered, contender, history, record, score, without_metrics

from gpt2core import lock
from gpt2core.checkpoint import save_alone
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import PromotionConfig
from gpt2core.flags import TRY_AGAIN, exit_code
from gpt2core.promote import describe, judge, promote
from gpt2core.records import Contender, current_best, pack
from gpt2core.report import evaluations
from gpt2core.run_folder import RunFolder


@pytest.fixture
def run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return without_metrics(lab.copy_run(straight, tmp_path))


@pytest.fixture
def other_run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return without_metrics(lab.copy_run(straight, tmp_path, name="other"))


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


def test_weights_that_are_not_finite_are_not_promoted_whatever_was_measured(run: Path) -> None:
    folder = CheckpointFolder(RunFolder(run.parent, "tiny").checkpoints)
    state = torch.load(folder.file("epoch_00001"), weights_only=True)
    state["model"]["transformer.wte.weight"][50256, 0] = -torch.inf  # of a token that the text may lack
    save_alone(folder, state, "epoch_00001")
    record(run, "epoch_00001", 3.5)
    with pytest.raises(ValueError, match=r"epoch_00001\.pt: transformer\.wte\.weight has 1 of 1,608,224 values"):
        promote(run.parent, "tiny")
    assert not (run.parent / "best").exists() and not history(run.parent)
    assert [path.name for path in (run.parent / "promoted").iterdir()] == [lock.LOCK_FILE]
    record(run, "epoch_00002", 3.4)
    assert promote(run.parent, "tiny").candidate.step == 24


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


# --- candidates ------------------------------------------------------------------------------------------------------


def test_only_epochs_and_the_best_are_candidates(run: Path) -> None:
    record(run, "rolling_step_000022", 3.0)
    with pytest.raises(ValueError, match=r"no measured checkpoint to promote \(its epochs' and its best one"):
        promote(run.parent, "tiny")
    record(run, "latest", 3.5)  # which is the end of epoch 2, too
    assert promote(run.parent, "tiny").candidate.checkpoint == "epoch_00002"


def test_a_measurement_on_other_data_does_not_stand_for_the_runs_own(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    record(run, "epoch_00001", 1.0, file="step_000012_0123abcd.json", val_fingerprint="easier")
    assert promote(run.parent, "tiny").candidate.val_loss == 3.5


def test_of_two_measurements_the_one_on_the_holders_data_counts(run: Path, other_run: Path) -> None:
    record(run, "epoch_00001", 2.0, val_fingerprint="asked for")
    promote(run.parent, "tiny")
    record(other_run, "epoch_00001", 3.5)
    record(other_run, "epoch_00001", 1.9, file="step_000012_0123abcd.json", val_fingerprint="asked for")
    assert promote(run.parent, "other").better_by == pytest.approx(0.1)


def test_a_best_checkpoint_that_is_just_being_written_is_worth_another_try(run: Path) -> None:
    record(run, "best_model", 3.5)
    sidecar = run / "checkpoints" / "best_model.json"
    kept = sidecar.rename(run / "kept.json")
    for name in ("epoch_00001", "epoch_00002"):
        (run / "checkpoints" / f"{name}.json").unlink()
    with pytest.raises(BlockingIOError, match=r"best_model.pt is just being written, .*: try again") as refused:
        promote(run.parent, "tiny")
    assert exit_code(refused.value) == TRY_AGAIN
    kept.rename(sidecar)
    assert promote(run.parent, "tiny").promoted


# --- the rule acc_norm -----------------------------------------------------------------------------------------------


BY_ACC_NORM = PromotionConfig(rule="acc_norm")


def scored(acc_norm: float, val_loss: float = 3.0, **changes: Any) -> Contender:
    return contender(val_loss, hellaswag=score(acc_norm, **changes))


@pytest.mark.parametrize(
    ("candidate", "holder", "margin", "promoted", "reason"),
    [
        (scored(0.30), None, 1.0, True, "first to be promoted, acc_norm 0.3000"),
        (scored(0.35), scored(0.30), 1.0, True, r"0.3500 against 0.3000 of a step 1, 1.18 standard errors"),
        (scored(0.34), scored(0.30), 1.0, False, "not better by more than 1 standard errors"),
        (scored(0.34), scored(0.30), 0.0, True, "better: acc_norm"),
        (scored(0.30), scored(0.30), 0.0, False, "a tie"),
        (scored(0.30), scored(0.35), 0.0, False, "not better: "),
        (scored(0.40, 9.0), scored(0.30, 3.0), 1.0, True, "better: "),  # whatever the losses
        (scored(0.40), contender(3.0), 1.0, False, "a step 1 was promoted without a HellaSwag result"),
        (scored(0.40), scored(0.30, examples=10), 1.0, False, "other HellaSwag examples"),
        (scored(0.40), scored(0.30, fingerprint="others"), 1.0, False, "other HellaSwag examples"),
        (scored(0.40, acc_norm_stderr=0.0), scored(0.30, acc_norm_stderr=0.0), 1.0, True, "better: "),
    ],
)
def test_judge_by_acc_norm(
    candidate: Contender, holder: Contender | None, margin: float, promoted: bool, reason: str
) -> None:
    verdict, why = judge(candidate, holder, PromotionConfig(rule="acc_norm", margin=margin))
    assert verdict is promoted
    assert reason in why


# Agresti, Categorical Data Analysis (2nd ed.), table 10.1: 1,600 persons asked twice; McNemar's z is 4.17 there.
BOTH, FIRST_ALONE, SECOND_ALONE, NEITHER = 794, 150, 86, 570
FIRST = [True] * (BOTH + FIRST_ALONE) + [False] * (SECOND_ALONE + NEITHER)
SECOND = [True] * BOTH + [False] * FIRST_ALONE + [True] * SECOND_ALONE + [False] * NEITHER


def test_answers_to_the_same_questions_are_compared_in_pairs() -> None:
    first, second = contender(3.0, hellaswag=answered(FIRST)), contender(3.0, hellaswag=answered(SECOND))
    verdict, why = judge(first, second, PromotionConfig(rule="acc_norm", margin=4.16))
    assert verdict, why
    assert "4.17 standard errors of the paired difference, 150 gained and 86 lost" in why
    assert not judge(first, second, PromotionConfig(rule="acc_norm", margin=4.17))[0]
    assert not judge(second, first, BY_ACC_NORM)[0]
    of_other_examples = contender(3.0, hellaswag=answered(SECOND, fingerprint="others"))
    assert "other HellaSwag examples" in judge(first, of_other_examples, BY_ACC_NORM)[1]


@pytest.mark.parametrize("without", ["candidate", "holder"])
def test_where_the_answers_were_not_kept_they_count_as_independent(without: str) -> None:
    old = {"right_by_acc_norm": None}
    first = contender(3.0, hellaswag=answered(FIRST, **old if without == "candidate" else {}))
    second = contender(3.0, hellaswag=answered(SECOND, **old if without == "holder" else {}))
    verdict, why = judge(first, second, PromotionConfig(rule="acc_norm", margin=2.2))
    assert verdict, why
    assert "2.29 standard errors of the difference, unpaired" in why  # 0.04 / sqrt(0.59 * 0.41 / n + 0.55 * 0.45 / n)
    assert not judge(first, second, PromotionConfig(rule="acc_norm", margin=2.3))[0]


def test_one_question_more_is_no_more_than_one_standard_error() -> None:
    holder = [True] * 3000 + [False] * 7042
    for gained, better in ((1, False), (2, True)):
        candidate = [True] * (3000 + gained) + [False] * (7042 - gained)
        compared = [contender(3.0, hellaswag=answered(answers)) for answers in (candidate, holder)]
        assert judge(*compared, BY_ACC_NORM)[0] is better


def test_the_record_says_by_which_standard_error_it_was_decided(run: Path) -> None:
    record(run, "epoch_00001", 3.5, hellaswag=answered(SECOND))
    promote(run.parent, "tiny", BY_ACC_NORM)
    record(run, "epoch_00002", 3.5, hellaswag=answered(FIRST))
    decision = promote(run.parent, "tiny", BY_ACC_NORM)
    assert decision.promoted and decision.paired
    assert (decision.better_by, decision.stderr) == (64 / 1600, pytest.approx(math.sqrt(236) / 1600))
    assert current_best(run.parent) == decision.candidate, "with its answers, for the next one"
    record(run, "epoch_00001", 3.5, hellaswag=score(0.7, examples=1600))
    assert promote(run.parent, "tiny", BY_ACC_NORM).paired is False


@pytest.mark.parametrize("damage", ["not base64!", pack([True] * 943), pack([False] * 1600 + [True] * 944)])
def test_answers_that_are_not_those_of_the_share_are_damage(run: Path, damage: str) -> None:
    record(run, "epoch_00001", 3.5)
    file = run / "evaluations" / "step_000012.json"
    whole = json.loads(file.read_text()) | {"hellaswag": answered(FIRST).model_dump() | {"right_by_acc_norm": damage}}
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"step_000012\.json is no evaluation"):
        promote(run.parent, "tiny", BY_ACC_NORM)


def test_the_candidate_by_acc_norm_is_the_one_with_the_highest(run: Path) -> None:
    record(run, "epoch_00001", 3.9, hellaswag=score(0.40))
    record(run, "epoch_00002", 3.5, hellaswag=score(0.30))
    decision = promote(run.parent, "tiny", BY_ACC_NORM)
    assert (decision.candidate.step, decision.rule) == (12, "acc_norm")
    decision = promote(run.parent, "tiny")
    assert decision.promoted and decision.candidate.step == 24, "by val_loss it is the other one"
    assert decision.better_by == pytest.approx(0.4)


def test_without_the_rules_number_none_is_promoted_and_it_says_so(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    with pytest.raises(ValueError, match=r"by acc_norm: epoch_00001 was measured, but its acc_norm is missing"):
        promote(run.parent, "tiny", BY_ACC_NORM)
    record(run, "epoch_00001", 3.5, hellaswag=score(float("nan")))
    with pytest.raises(ValueError, match=r"its acc_norm is missing or not finite"):
        promote(run.parent, "tiny", BY_ACC_NORM)
    record(run, "epoch_00001", float("nan"), hellaswag=score(0.5))
    with pytest.raises(ValueError, match="no measured checkpoint"):
        promote(run.parent, "tiny", BY_ACC_NORM)
    assert not (run.parent / "best").exists()


def test_a_damaged_measurement_is_named(run: Path, capsys: Any) -> None:
    record(run, "epoch_00002", 3.5)
    (run / "evaluations" / "step_000099.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"step_000099\.json is no evaluation: remove it and evaluate again"):
        promote(run.parent, "tiny")
    assert set(evaluations(RunFolder(run.parent, "tiny"))) == {24}
    assert "step_000099.json is no evaluation" in capsys.readouterr().out
