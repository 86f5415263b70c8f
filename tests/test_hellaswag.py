"""HellaSwag by build-nanogpt's convention, checked against the same sum done one ending at a time, and by lm-eval's."""

from __future__ import annotations

import base64
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2core import shared_context
from gpt2core.config import VOCAB_SIZE, ModelConfig
from gpt2core.distributed import Ranks
from gpt2core.hellaswag import Example, Questions, evaluate_hellaswag, load_hellaswag
from gpt2core.model import GPT
from gpt2core.shared_context import ending_losses
from gpt2core.tokenizer import encoding

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "hellaswag_sample.jsonl"
ALONE = Ranks(0, 1, torch.device("cpu"))
GOOD = {"ctx": "A man sits down. he", "endings": ["a b", "c d", "e f", "g h"], "label": 2}


def make_model(context_length: int, seed: int = 0) -> GPT:
    model = GPT(ModelConfig(context_length=context_length, num_layers=2, embd_size=32, num_heads=2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # far wider than a fresh model, so that endings differ clearly
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def one_ending(model: GPT, ctx: str, ending: str) -> tuple[float, float]:
    """Summed and mean loss over the ending's tokens, as build-nanogpt's hellaswag.py has it, with no batching."""
    context, tail = encoding().encode_ordinary(ctx), encoding().encode_ordinary(" " + ending)
    tokens = torch.tensor([(context + tail)[-model.config.context_length :]])
    losses = F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")
    of_ending = losses[-len(tail) :]
    return of_ending.sum().item(), of_ending.mean().item()


@pytest.mark.parametrize("context_length", [256, 48])  # 48 is too short for some contexts, which lose their beginning
def test_the_score_is_that_of_one_ending_at_a_time(context_length):
    examples = load_hellaswag(str(SAMPLE))[:40]
    model = make_model(context_length)
    expected = torch.tensor(
        [[one_ending(model, example.ctx, ending) for ending in example.endings] for example in examples],
        dtype=torch.float64,
    )  # (40, 4, 2)
    labels = torch.tensor([example.label for example in examples])
    right = [expected[..., kind].argmin(1) == labels for kind in (0, 1)]
    acc, acc_norm = (kind.double().mean().item() for kind in right)
    assert acc != acc_norm  # else the two could be swapped unseen
    questions = Questions.of(examples, "build-nanogpt", context_length)
    assert (questions.truncated > 0) == (context_length == 48)
    result = evaluate_hellaswag(model, questions, ALONE)
    assert (result.convention, result.examples, result.truncated) == ("build-nanogpt", 40, questions.truncated)
    assert (result.acc, result.acc_norm) == (acc, acc_norm)
    kept = np.frombuffer(base64.b64decode(result.right_by_acc_norm), np.uint8)
    assert np.unpackbits(kept, count=40, bitorder="little").tolist() == right[1].tolist()
    losses = ending_losses(model, questions.rows, ALONE).view(40, 4)
    torch.testing.assert_close(losses, expected[..., 0], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(losses / questions.lengths, expected[..., 1], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("convention", ["build-nanogpt", "lm-eval"])
def test_a_context_is_computed_once_for_its_four_endings(convention):
    examples = load_hellaswag(str(SAMPLE))
    questions = Questions.of(examples, convention, 1024)
    assert len(questions.rows) == 200
    one_at_a_time = sum(len(row.context) + len(ending) for row in questions.rows for ending in row.endings)
    computed = [len(batch[0]) * len(batch) for batch in shared_context._batches(questions.rows)]
    assert sum(computed) < 0.7 * one_at_a_time
    assert len(computed) > 1
    assert max(computed) <= shared_context.COLUMNS_PER_BATCH


def test_the_size_of_the_batches_changes_no_choice(monkeypatch):
    model, questions = make_model(256), Questions.of(load_hellaswag(str(SAMPLE))[:40], "lm-eval", 256)
    in_big_ones = ending_losses(model, questions.rows, ALONE)
    monkeypatch.setattr(shared_context, "COLUMNS_PER_BATCH", 700)
    monkeypatch.setattr(shared_context, "TOKENS_PER_HEAD", 100)
    torch.testing.assert_close(ending_losses(model, questions.rows, ALONE), in_big_ones, atol=1e-3, rtol=1e-5)


def test_the_vocabularys_padding_takes_no_part():
    model, questions = make_model(256), Questions.of(load_hellaswag(str(SAMPLE))[:4], "build-nanogpt", 256)
    before = ending_losses(model, questions.rows, ALONE)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] = 100.0
    assert torch.equal(ending_losses(model, questions.rows, ALONE), before)


def test_a_model_of_nan_has_no_accuracy():
    model, questions = make_model(256), Questions.of(load_hellaswag(str(SAMPLE))[:4], "build-nanogpt", 256)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    result = evaluate_hellaswag(model, questions, ALONE)
    assert math.isnan(result.acc) and math.isnan(result.acc_norm) and math.isnan(result.acc_stderr)
    assert result.right_by_acc_norm is None


def test_an_ending_longer_than_the_model_can_read_is_measured_at_its_end():
    example = Example(ctx="A man", endings=["runs " * count for count in (1, 30, 2, 3)], label=0)
    questions = Questions.of([example], "build-nanogpt", 16)
    long = questions.rows[1]
    assert (len(long.context), len(long.endings[0])) == (1, 15)
    assert questions.lengths[0, 1] == 15
    assert questions.truncated == 1


def test_what_lm_eval_needs_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"activity_label, ctx_a and ctx_b, which example 1 lacks.*build-nanogpt"):
        Questions.of([Example(**GOOD)], "lm-eval", 256)
    with pytest.raises(ValueError, match=r"example 2 has an ending of nothing but markup"):
        whole = {"activity_label": "Sitting", "ctx_a": "A man sits.", "ctx_b": ""}
        good = Example(**GOOD, **whole)
        bad = Example(**(GOOD | whole | {"endings": ["a", "b", "[step]", "d"]}))
        Questions.of([good, bad], "lm-eval", 256)


def test_the_bundled_sample_is_200_examples():
    examples = load_hellaswag(str(SAMPLE))
    assert len(examples) == 200
    assert {example.label for example in examples} == {0, 1, 2, 3}
    assert examples[0].ctx == "A man is sitting on a roof. he"
    assert examples[0].endings[examples[0].label] == "starts pulling up roofing on a roof."


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_labels_written_as_text_and_gzip_are_read(tmp_path):
    plain = load_hellaswag(write(tmp_path / "h.jsonl", GOOD | {"label": "2"}))
    assert plain == [Example(**GOOD)]
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD) + "\n")
    assert load_hellaswag(str(tmp_path / "h.jsonl.gz")) == plain


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{not json", "not JSON"),
        (GOOD | {"label": 4}, "label"),
        (GOOD | {"label": -1}, "label"),
        (GOOD | {"label": ""}, "label"),
        (GOOD | {"label": True}, "label: the number of the right ending, 0 to 3, is needed, got true"),
        (GOOD | {"label": 1.0}, "label: the number .* got 1.0"),
        (GOOD | {"label": "1.0"}, 'label: the number .* got "1.0"'),
        (GOOD | {"label": " 1"}, "label"),
        (GOOD | {"label": None}, "label: the number .* got null"),
        (GOOD | {"endings": ["a", "b", "c"]}, "endings"),
        (GOOD | {"endings": ["a", "b", "c", "d", "e"]}, "endings"),
        (GOOD | {"endings": ["a", "b", "c", None]}, "endings"),
        (GOOD | {"endings": ["a", "b", "c", ""]}, "endings"),
        (GOOD | {"ctx": ""}, "ctx"),
        (GOOD | {"ctx": "   "}, "ctx"),
        ({"endings": GOOD["endings"], "label": 1}, "ctx"),
        ({"ctx": "x", "endings": GOOD["endings"]}, "label"),
        ([1, 2], ""),
    ],
)
def test_a_malformed_example_is_refused_with_its_line(tmp_path, bad, said):
    path = write(tmp_path / "h.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(ValueError, match=rf"h\.jsonl, line 3: .*{said}") as caught:
        load_hellaswag(path)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"ctx": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"h\.jsonl"):
        load_hellaswag(str(tmp_path / "h.jsonl"))


def test_a_missing_and_an_empty_file_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        load_hellaswag(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no examples"):
        load_hellaswag(write(tmp_path / "empty.jsonl"))


def test_the_standard_error_is_of_a_share():
    result = evaluate_hellaswag(make_model(256), Questions.of(load_hellaswag(str(SAMPLE))[:8], "lm-eval", 256), ALONE)
    answers = np.unpackbits(np.frombuffer(base64.b64decode(result.right_by_acc_norm), np.uint8), count=8)
    assert 0 < result.acc_norm < 1
    assert result.acc_norm_stderr == pytest.approx(answers.std() / math.sqrt(8))
    assert result.acc_stderr == pytest.approx(math.sqrt(result.acc * (1 - result.acc) / 8))
