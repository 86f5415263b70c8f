"""HellaSwag by lm-eval's convention against EleutherAI's lm-evaluation-harness itself, choice by choice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.config import ModelConfig
from gpt2core.distributed import Ranks
from gpt2core.export import export_huggingface
from gpt2core.hellaswag import Questions, choices, load_hellaswag
from gpt2core.model import GPT

pytestmark = pytest.mark.slow  # each test runs the harness

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "hellaswag_sample.jsonl"
ALONE = Ranks(0, 1, torch.device("cpu"))
TIE = 1e-3  # nats, far below what two endings usually differ by, far above what the order of sums changes


def make_model(folder: Path, context_length: int) -> GPT:
    """A model whose endings differ clearly, exported into the folder for the harness."""
    model = GPT(ModelConfig(context_length=context_length, num_layers=2, embd_size=32, num_heads=2)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    export_huggingface(model.state_dict(), model.config, folder, "model")
    return model


def harness_scores(folder: Path, examples: Path, monkeypatch: Any) -> list[tuple[list[float], list[float]]]:
    """What the harness compares for each example: log-likelihoods of the endings, and the same a character."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    task = {  # the harness's own task, with its examples from a file
        "task": "hellaswag_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(examples)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    model = HFLM(pretrained=str(folder), device="cpu", batch_size=32, dtype="float32")
    results = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    scores = []
    for sample in sorted(results["samples"]["hellaswag_file"], key=lambda sample: sample["doc_id"]):
        summed = [log_likelihood for log_likelihood, _ in sample["filtered_resps"]]
        lengths = [len(choice) for choice in sample["doc"]["choices"]]
        scores.append((summed, [score / length for score, length in zip(summed, lengths, strict=True)]))
    return scores


def check_all_choices(model: GPT, folder: Path, examples: Path, monkeypatch: Any) -> None:
    questions = Questions.of(load_hellaswag(str(examples)), "lm-eval", model.config.context_length)
    chosen = choices(model, questions, ALONE)
    assert chosen is not None
    scores = harness_scores(folder, examples, monkeypatch)
    assert len(scores) == len(questions.labels)
    differing, ties = [], 0
    for number, (summed, a_character) in enumerate(scores):
        for kind, values in enumerate([summed, a_character]):
            ours = int(chosen[kind][number])
            best = max(values)
            if values[ours] != best:
                is_tie = (best - values[ours]) * (1 if kind == 0 else 100) < TIE
                ties += is_tie
                differing += [] if is_tie else [(number, kind)]
    assert not differing
    assert ties <= len(scores) // 1000


def test_each_choice_is_the_harnesses_own(tmp_path: Path, monkeypatch: Any) -> None:
    """Of a model that is too short for some contexts."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[100:140]), encoding="utf-8")
    check_all_choices(make_model(tmp_path / "model", 96), tmp_path / "model", few, monkeypatch)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    "HELLASWAG_VAL" not in os.environ, reason="HELLASWAG_VAL: path of the whole validation set as jsonl"
)
def test_each_choice_of_the_whole_set_is_the_harnesses_own(tmp_path: Path, monkeypatch: Any) -> None:
    model = make_model(tmp_path / "model", 1024)
    check_all_choices(model, tmp_path / "model", Path(os.environ["HELLASWAG_VAL"]), monkeypatch)
