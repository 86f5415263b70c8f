"""Measuring a checkpoint: the same numbers as training logged, on any number of ranks, and never twice."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2core.config import ModelConfig
from gpt2core.distributed import dtype_to_measure_in
from gpt2core.evaluate import add_arguments, describe, evaluate
from gpt2core.export import export_huggingface
from gpt2core.loader import Sequences
from gpt2core.records import Evaluation, unpack
from gpt2core.report import evaluations
from gpt2core.run_folder import RunFolder
from gpt2core.shards import open_shards
from gpt2core.tokenizer import EOT, encoding
from tasks.evaluate_checkpoint import candidates

pytestmark = pytest.mark.slow  # each test starts trainers or other processes


@pytest.fixture(scope="session")
def hellaswag(lab: Any) -> Path:
    return lab.examples(16)


@pytest.fixture
def run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return lab.copy_run(straight, tmp_path)


@pytest.fixture
def measure(run: Path, hellaswag: Path) -> Any:
    def measure(checkpoint: object, *flags: object, name: str = "tiny") -> Evaluation:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        where = ["--checkpoint", checkpoint, "--artifacts_dir", run.parent, "--run_name", name, "--device", "cpu"]
        on = ["--hellaswag", hellaswag, "--hellaswag_convention", "build-nanogpt"]
        return evaluate(parser.parse_args([str(word) for word in [*where, *on, *flags]]))

    return measure


def stored(run: Path, step: int) -> Path:
    """The only result of a step, which has another HellaSwag than the run's settings name."""
    (found,) = (run / "evaluations").glob(f"step_{step:06d}_????????.json")
    return found


@pytest.mark.parametrize(("name", "step"), [("latest", 24), ("epoch_00001", 12), ("rolling_step_000022", 22)])
def test_a_name_measures_what_training_measured(
    measure: Any, run: Path, lab: Any, straight: Path, name: str, step: int
) -> None:
    result = measure(name)
    assert (result.checkpoint, result.step) == (name, step)
    val_losses = lab.logged(straight, "val_loss")
    if step in val_losses:
        assert result.val_loss == pytest.approx(val_losses[step], abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.val_loss))
    assert Evaluation.model_validate_json(stored(run, step).read_text()) == result
    answers = unpack(result.hellaswag.right_by_acc_norm)
    assert answers.bit_count() == round(16 * result.hellaswag.acc_norm) and answers < 2**16


def test_best_is_the_checkpoint_of_lowest_logged_loss(measure: Any, lab: Any, straight: Path) -> None:
    val_losses = {step: loss for step, loss in lab.logged(straight, "val_loss").items() if step}
    result = measure("best")
    assert result.checkpoint == "best_model"
    assert result.step == min(val_losses, key=val_losses.__getitem__)
    assert result.val_loss == pytest.approx(min(val_losses.values()), abs=1e-6)


def test_a_path_is_measured_once_and_its_result_lies_beside_it(measure: Any, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.pt"
    elsewhere.write_bytes((run / "checkpoints" / "latest.pt").read_bytes())
    result = measure(elsewhere)
    assert not (run / "evaluations").exists()
    assert result.val_loss == measure("latest").val_loss
    (beside,) = tmp_path.glob("elsewhere.evaluation_*.json")
    assert Evaluation.model_validate_json(beside.read_text()) == result
    assert measure(elsewhere) == result
    elsewhere.write_bytes((run / "checkpoints" / "epoch_00001.pt").read_bytes())
    assert measure(elsewhere).step == 12


def test_a_folder_of_transformers_is_measured(measure: Any, run: Path, lab: Any, tmp_path: Path) -> None:
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    export_huggingface(state["model"], ModelConfig.model_validate(state["config"]["model"]), tmp_path / "hf", "latest")
    on = ["--data_dir", lab.data_dir, "--val_tokens", "1024"]
    assert measure(tmp_path / "hf", *on).val_loss == pytest.approx(measure("latest", *on).val_loss, abs=1e-5)
    assert list(tmp_path.glob("hf.evaluation_*.json"))


def test_a_measurement_on_other_data_does_not_replace_the_runs_own(measure: Any, run: Path, tmp_path: Path) -> None:
    ad_hoc = measure("latest", "--result", tmp_path / "result.json")
    own = run / "evaluations" / "step_000024.json"
    own.write_text(ad_hoc.model_copy(update={"val_loss": 1.0}).model_dump_json())
    measure("latest", "--val_tokens", "256")
    assert Evaluation.model_validate_json(own.read_text()).val_loss == 1.0
    assert len(list((run / "evaluations").glob("*.json"))) == 3
    assert evaluations(RunFolder(run.parent, "tiny"))[24].val_loss == 1.0
    assert Evaluation.model_validate_json((tmp_path / "result.json").read_text()) == ad_hoc


def test_a_file_url_is_measured_too(measure: Any, run: Path) -> None:
    result = measure(f"file://{run / 'checkpoints' / 'epoch_00001.pt'}")
    assert result.step == 12


def test_a_stored_result_is_reused_until_forced_or_asked_otherwise(measure: Any, run: Path, capsys: Any) -> None:
    first = measure("latest")
    capsys.readouterr()
    assert measure("latest") == first
    assert "already measured" in capsys.readouterr().out
    again = measure("latest", "--force")
    assert again.duration_s != first.duration_s
    assert again.val_loss == first.val_loss
    fewer = measure("latest", "--val_tokens", "256")
    assert fewer.val_tokens == 256
    assert fewer.val_loss != first.val_loss


def test_the_runs_own_measurements_are_in_its_metrics_and_no_others(
    measure: Any, run: Path, hellaswag: Path, monkeypatch: Any
) -> None:
    before = (run / "metrics.jsonl").read_text()
    measure("latest")
    assert (run / "metrics.jsonl").read_text() == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the run's own HellaSwag is on the hub
    own = ["--artifacts_dir", run.parent, "--run_name", "tiny", "--device", "cpu", "--hellaswag_convention", "lm-eval"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    result = evaluate(parser.parse_args([str(word) for word in own]))
    assert (run / "evaluations" / "step_000024.json").exists()
    (line,) = (run / "metrics.jsonl").read_text().removeprefix(before).splitlines()
    assert (json.loads(line)["step"], json.loads(line)["val_loss"]) == (24, result.val_loss)


def test_other_examples_under_the_same_name_are_measured_anew(measure: Any, hellaswag: Path, tmp_path: Path) -> None:
    changing = tmp_path / "changing.jsonl"
    lines = hellaswag.read_text(encoding="utf-8").splitlines(keepends=True)
    changing.write_text("".join(lines[:8]), encoding="utf-8")
    first = measure("latest", "--hellaswag", changing)
    changing.write_text("".join(lines[8:]), encoding="utf-8")
    second = measure("latest", "--hellaswag", changing)
    assert first.hellaswag.fingerprint != second.hellaswag.fingerprint
    changing.write_text("broken now", encoding="utf-8")
    with pytest.raises(ValueError, match=r"changing\.jsonl, line 1: not JSON"):
        measure("latest", "--hellaswag", changing)


def test_a_path_to_another_runs_checkpoint_is_not_taken_for_this_runs(measure: Any, run: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        measure(run / "checkpoints" / "epoch_00001", name="nobody")


def test_a_checkpoint_that_is_just_being_written_may_be_tried_again(measure: Any, run: Path) -> None:
    (run / "checkpoints" / "best_model.json").unlink()
    with pytest.raises(
        BlockingIOError, match=r"best_model\.pt is just being written, or was never finished: try again"
    ):
        measure("best")


def test_another_dataset_is_measured_anew(measure: Any, other_data_dir: Path) -> None:
    first, other = measure("latest"), measure("latest", "--data_dir", other_data_dir)
    assert other.val_fingerprint != first.val_fingerprint
    assert other.val_loss > first.val_loss  # random tokens


def test_a_new_checkpoint_of_the_same_step_is_measured_anew(measure: Any, run: Path) -> None:
    measure("latest")
    record = json.loads(stored(run, 24).read_text()) | {"sha256": "0" * 64, "val_loss": 1.0}
    stored(run, 24).write_text(json.dumps(record))
    assert measure("latest").val_loss > 9


def test_an_unknown_checkpoint_is_an_error_that_lists_what_is_there(measure: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoint epoch_00009: there is no such file") as caught:
        measure("epoch_00009")
    for name in ("latest", "best_model", "epoch_00001", "epoch_00002"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"there are: none"):
        measure("latest", name="no_such_run")


def test_a_damaged_checkpoint_is_refused(measure: Any, run: Path) -> None:
    path = run / "checkpoints" / "latest.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"latest\.pt.*damaged"):
        measure("latest")


def test_hellaswag_gives_shares_with_standard_errors(measure: Any, hellaswag: Path) -> None:
    result = measure("latest")
    score = result.hellaswag
    assert score.examples == 16
    assert score.source == str(hellaswag)
    for share, stderr in [(score.acc, score.acc_stderr), (score.acc_norm, score.acc_norm_stderr)]:
        assert 0 <= share <= 1
        assert (share * 16).is_integer()
        assert stderr == pytest.approx(math.sqrt(share * (1 - share) / 16))
    assert f"acc_norm {score.acc_norm:.4f} ± {score.acc_norm_stderr:.4f}" in describe(result)


def test_both_conventions_are_measured_and_named(measure: Any) -> None:
    result = measure("latest", "--hellaswag_convention", "both")
    assert result.hellaswag.convention == "build-nanogpt"
    assert result.hellaswag_lm_eval.convention == "lm-eval"
    assert result.hellaswag_lm_eval.truncated > 0  # the model reads 32 tokens
    said = describe(result)
    assert "HellaSwag (build-nanogpt, 16 examples" in said and "HellaSwag (lm-eval, 16 examples" in said
    assert measure("latest") == result  # it has what is asked for now, and more
    assert measure("latest", "--force").hellaswag_lm_eval == result.hellaswag_lm_eval


def test_a_file_for_one_convention_is_measured_by_that(
    measure: Any, hellaswag: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [json.loads(line) for line in hellaswag.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(
        "".join(json.dumps({name: row[name] for name in ("ctx", "endings", "label")}) + "\n" for row in rows)
    )
    result = measure("latest", "--hellaswag", bare, "--hellaswag_convention", "both")
    assert result.hellaswag and not result.hellaswag_lm_eval
    assert "lacks what lm-eval's convention needs: activity_label" in capsys.readouterr().out
    assert measure("latest", "--hellaswag", bare, "--hellaswag_convention", "both") == result
    with pytest.raises(ValueError, match=r"needs activity_label, ctx_a and ctx_b"):
        measure("latest", "--hellaswag", bare, "--hellaswag_convention", "lm-eval")


def test_bits_per_byte_are_of_the_text_alone(measure: Any, lab: Any) -> None:
    """Against the tokens decoded, one number for all of them."""
    result = measure("latest", "--val_tokens", "1024")
    tokens = Sequences(open_shards(str(lab.data_dir), "val"), 32)
    targets = torch.cat([tokens.batch(np.array([number]))[1].flatten() for number in range(32)])
    text_bytes = len(encoding().decode_bytes([token for token in targets.tolist() if token != EOT]))
    whole = 1024 * result.val_loss / math.log(2) / text_bytes
    assert result.bits_per_byte <= whole
    assert result.bits_per_byte == pytest.approx(whole, rel=0.02)  # what <|endoftext|> costs
    assert 0 < result.val_loss_stderr < 1


def test_a_model_of_nan_is_measured_as_such(measure: Any, run: Path, tmp_path: Path) -> None:
    state = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    state["model"]["transformer.ln_f.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    first = measure(tmp_path / "nan.pt")
    assert math.isnan(first.val_loss) and math.isnan(first.hellaswag.acc_norm)
    assert measure(tmp_path / "nan.pt").measured_at == first.measured_at


def test_a_hellaswag_file_that_is_not_there_is_an_error(measure: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl: cannot be read"):
        measure("latest", "--hellaswag", tmp_path / "missing.jsonl")


def test_two_ranks_get_what_one_gets(run: Path, lab: Any, hellaswag: Path) -> None:
    """One of them as `gpt2 evaluate`, the other under torchrun, from a shell."""
    flags = ["--checkpoint", "best", "--artifacts_dir", run.parent, "--run_name", "tiny", "--hellaswag", hellaswag]
    results = []
    for module, arguments, nproc in [("gpt2core.cli", ["evaluate"], 1), ("gpt2core.evaluate", ["--force"], 2)]:
        done = lab.run(module, [*arguments, *flags], nproc)
        assert done.returncode == 0, done.stderr
        (stored,) = (run / "evaluations").glob("*.json")
        results.append(Evaluation.model_validate_json(stored.read_text()))
        assert re.search(rf"val_loss {results[-1].val_loss:.4f}", done.stdout)
    one, two = results
    assert two.measured_at > one.measured_at or two.duration_s != one.duration_s
    assert two.val_loss == one.val_loss
    assert (two.hellaswag.acc, two.hellaswag.acc_norm) == (one.hellaswag.acc, one.hellaswag.acc_norm)


def test_the_best_checkpoint_is_measured_too_where_it_is_earlier_than_the_epochs(run: Path) -> None:
    folder = run / "checkpoints"
    assert [candidates(str(run.parent), "tiny", epoch) for epoch in (1, 2)] == [["epoch_00001"], ["epoch_00002"]]
    for kind in (".pt", ".json"):
        (folder / f"rolling_step_000022{kind}").replace(folder / f"best_model{kind}")
    assert [candidates(str(run.parent), "tiny", epoch) for epoch in (1, 2)] == [
        ["epoch_00001"],
        ["epoch_00002", "best"],
    ]


def test_a_gpu_without_bf16_measures_in_fp32_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for precision in ("bf16", "fp8"):
        assert dtype_to_measure_in(precision, torch.device("cuda", 0)) == torch.float32
        assert "WARNING: computing in fp32, for precision bf16: Tesla V100 does not have it" in capsys.readouterr().out
    assert dtype_to_measure_in("bf16", torch.device("cpu")) == torch.bfloat16
