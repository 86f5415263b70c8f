"""Generation beside transformers' generate: same shape, same prompt, greedy, turn by turn in one process.

    python tests/benchmarks/generate.py [--device cpu|cuda] [--size 124M] [--rows 1 8]

Both keep keys and values. Weights are random, and end of text is not heeded, so that both make the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2core.config import MODEL_SIZES, VOCAB_SIZE
from gpt2core.distributed import pick_device, pick_dtype
from gpt2core.generate import PROMPT, Sampling, generate_each
from gpt2core.model import GPT
from gpt2core.tokenizer import encoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="124M", choices=MODEL_SIZES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    shape = MODEL_SIZES[arguments.size]
    ours = GPT(shape, pick_dtype("auto", device))
    ours.init_weights(torch.Generator().manual_seed(0))
    ours.to(device).eval().cast_weights()  # as run_checkpoint has it
    sizes = {"n_layer": shape.num_layers, "n_embd": shape.embd_size, "n_head": shape.num_heads}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, eos_token_id=None, **sizes))
    theirs.to(device, ours.compute_dtype).eval()
    prompt = torch.tensor([encoding().encode_ordinary(PROMPT)], device=device)
    options = {"max_new_tokens": arguments.new_tokens, "do_sample": False, "pad_token_id": 0}
    print(
        f"{device.type}, {arguments.size}, {arguments.new_tokens} tokens a row; tokens/s, median of {arguments.rounds}"
    )
    for rows in arguments.rows:
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda rows=rows: generate_each(
                ours, [PROMPT] * rows, Sampling(arguments.new_tokens, temperature=0)
            ),
            "transformers": lambda rows=rows: theirs.generate(prompt.expand(rows, -1), **options).cpu(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
        rate = {name: rows * arguments.new_tokens / statistics.median(times[1:]) for name, times in seconds.items()}
        print(f"{rows} rows: " + ", ".join(f"{name} {value:,.1f}" for name, value in rate.items()), end="")
        print(f", ratio {rate['ours'] / rate['transformers']:.2f}")


if __name__ == "__main__":
    main()
