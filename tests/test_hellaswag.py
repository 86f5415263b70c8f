"""HellaSwag by build-nanogpt's convention, checked against the same sum done one ending at a time."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt2core import hellaswag
from gpt2core.config import ModelConfig
from gpt2core.distributed import Ranks
from gpt2core.hellaswag import Example, HellaSwagResult, evaluate_hellaswag, load_hellaswag
from gpt2core.model import GPT
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
    acc, acc_norm = ((expected[..., kind].argmin(1) == labels).double().mean().item() for kind in (0, 1))
    assert acc != acc_norm  # else the two could be swapped unseen
    result = evaluate_hellaswag(model, examples, ALONE)
    assert result == HellaSwagResult(examples=40, acc=acc, acc_norm=acc_norm)

    candidates = hellaswag._candidates(examples, context_length)
    order = sorted(range(160), key=lambda i: -len(candidates[i].tokens))
    losses = torch.zeros(2, 160)
    with torch.no_grad():
        for batch in hellaswag._batches(order, candidates):
            losses[:, batch] = hellaswag._ending_losses(model, [candidates[i] for i in batch], ALONE.device)
    torch.testing.assert_close(losses.view(2, 40, 4).permute(1, 2, 0), expected.float(), atol=2e-3, rtol=1e-4)


def test_every_candidate_is_in_one_batch_and_no_batch_is_too_big():
    candidates = hellaswag._candidates(load_hellaswag(str(SAMPLE)), 1024)
    assert len(candidates) == 800
    order = sorted(range(800), key=lambda i: -len(candidates[i].tokens))
    batches = list(hellaswag._batches(order, candidates))
    assert sorted(i for batch in batches for i in batch) == list(range(800))
    assert len(batches) > 1
    for batch in batches:
        assert max(len(candidates[i].tokens) for i in batch) * len(batch) <= hellaswag.TOKENS_PER_BATCH


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
        (GOOD | {"endings": ["a", "b", "c"]}, "endings"),
        (GOOD | {"endings": ["a", "b", "c", "d", "e"]}, "endings"),
        (GOOD | {"endings": ["a", "b", "c", None]}, "endings"),
        (GOOD | {"ctx": ""}, "ctx"),
        ({"endings": GOOD["endings"], "label": 1}, "ctx"),
        ({"ctx": "x", "endings": GOOD["endings"]}, "label"),
        ([1, 2], ""),
    ],
)
def test_a_malformed_example_is_refused_with_its_number(tmp_path, bad, said):
    path = write(tmp_path / "h.jsonl", GOOD, GOOD, bad, GOOD)
    with pytest.raises(ValueError, match=rf"h\.jsonl, example 3: .*{said}") as caught:
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
    result = HellaSwagResult(examples=10_042, acc=0.25, acc_norm=0.5)
    assert result.acc_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 10_042))
    assert result.acc_norm_stderr == pytest.approx(0.5 / math.sqrt(10_042))
