"""HellaSwag beside build-nanogpt's way: one example at a time, four whole rows, all logits; same weights, same device.

    python tests/benchmarks/hellaswag.py [--device cpu|cuda] [--size 124M] [--source FILE] [--examples 10042] [--beside 200]

All `--examples` are evaluated, and `--beside` of them the other way, the two turn by turn. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt2core.config import MODEL_SIZES, ModelConfig
from gpt2core.distributed import Ranks, pick_device, pick_dtype
from gpt2core.hellaswag import Example, Questions, evaluate_hellaswag, load_hellaswag
from gpt2core.model import GPT
from gpt2core.tokenizer import encoding

SAMPLE = Path(__file__).parents[2] / "data" / "sample" / "hellaswag_sample.jsonl"
TINY = ModelConfig(context_length=256, num_layers=1, embd_size=32, num_heads=2)


@torch.no_grad()
def one_at_a_time(model: GPT, examples: list[Example], device: torch.device) -> list[int]:
    """The choices by mean loss: for each example a batch of four padded rows, encoded on the spot."""
    encode = encoding().encode_ordinary
    chosen = []
    for example in examples:
        context = encode(example.ctx)
        tails = [encode(f" {ending}") for ending in example.endings]
        width = len(context) + max(map(len, tails))
        tokens = torch.zeros(4, width, dtype=torch.long)
        is_ending = torch.zeros(4, width)
        for row, tail in enumerate(tails):
            tokens[row, : len(context) + len(tail)] = torch.tensor(context + tail)
            is_ending[row, len(context) : len(context) + len(tail)] = 1
        tokens, is_ending = tokens.to(device), is_ending[:, 1:].to(device)
        logits = model(tokens)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        chosen.append(int(((losses * is_ending).sum(1) / is_ending.sum(1)).argmin()))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="124M", choices=[*MODEL_SIZES, "tiny"])
    parser.add_argument("--source", default=str(SAMPLE))
    parser.add_argument("--examples", type=int, default=10_042)
    parser.add_argument("--beside", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    shape = TINY if arguments.size == "tiny" else MODEL_SIZES[arguments.size]
    model = GPT(shape, pick_dtype("auto", device))
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device).eval()
    examples = load_hellaswag(arguments.source)[: arguments.examples]
    began = time.perf_counter()
    questions = Questions.of(examples, "build-nanogpt", shape.context_length)
    print(f"{device.type}, {arguments.size}, {len(examples)} examples, encoded in {time.perf_counter() - began:.2f} s")
    shared, apart = sum(map(len, questions.rows)), sum(len(row.context) * 4 for row in questions.rows)
    apart += sum(len(ending) for row in questions.rows for ending in row.endings)
    print(f"{shared:,} tokens to compute, {apart:,} with the context anew for each ending", flush=True)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "ours": (len(examples), lambda: evaluate_hellaswag(model, questions, Ranks(0, 1, device))),
        "one at a time": (
            min(arguments.beside, len(examples)),
            lambda: one_at_a_time(model, examples[: arguments.beside], device),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):  # the first warms up
        for name, (_, run) in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: count / statistics.median(seconds[name][1:]) for name, (count, _) in ways.items()}
    for name, (count, _) in ways.items():
        print(f"{name}: {rates[name]:,.1f} examples/s ({statistics.median(seconds[name][1:]):.2f} s for {count})")
    print(f"ratio {rates['ours'] / rates['one at a time']:.1f}")
    if device.type == "cuda":
        print(
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, held {torch.cuda.memory_allocated() / 2**30:.2f}"
        )


if __name__ == "__main__":
    main()
