"""What FP8 is made of, kernel by kernel: rounding each of the model's tensors (TB/s beside a copy) and its matrix products
(TFLOP/s beside bf16).

    python tests/benchmarks/fp8_kernels.py [--size 124M] [--tokens 65536]      tokens of a micro-step
    python tests/benchmarks/fp8_kernels.py --size tiny --device cpu            emulated, to see that it runs
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from gpt2core.config import MODEL_SIZES, ModelConfig
from gpt2core.distributed import pick_device
from gpt2core.fp8_cast import E4M3, E5M2, What, cast, product
from gpt2core.fused_loss import ROWS

TINY = ModelConfig(context_length=32, num_layers=2, embd_size=32, num_heads=2)


def seconds(do: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a call; on a GPU of ten in a row, by its own clock."""
    do()
    measured = []
    for _ in range(rounds):
        if device.type == "cpu":
            started = time.perf_counter()
            do()
            measured.append(time.perf_counter() - started)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            do()
        end.record()
        torch.cuda.synchronize(device)
        measured.append(begin.elapsed_time(end) / 10_000)
    return statistics.median(measured)


def rounding(shape: ModelConfig, tokens: int, device: torch.device, rounds: int) -> None:
    width, head_tokens = shape.embd_size, min(tokens, ROWS)
    casts: list[tuple[str, What, int, int, bool]] = [  # what, in which way, rows, columns, with the sums of a gradient
        ("activation", "itself", tokens, width, False),
        ("GELU of one", "gelu", tokens, 4 * width, False),
        ("gradient", "itself", tokens, width, True),
        ("gradient of qkv", "itself", tokens, 3 * width, True),
        ("gradient times GELU's", "gelu_gradient", tokens, 4 * width, True),
        ("gradient of the logits", "softmax_gradient", head_tokens, shape.vocab_size, False),
    ]
    whole = torch.empty(2 * tokens * width, dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(whole)
    took = seconds(lambda: copied.copy_(whole), device, rounds)
    print(
        f"{'rounding':26}{'us':>8}{'TB/s':>8}\n{'(a copy)':26}{1e6 * took:8.0f}{8 * tokens * width / took / 1e12:8.2f}"
    )
    for name, what, rows, columns, with_sums in casts:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        other = torch.randn_like(x) if what == "gelu_gradient" else None
        targets = None
        if what == "softmax_gradient":
            other, targets = x.float().logsumexp(1), torch.zeros(rows, dtype=torch.int64, device=device)
        dtype = E5M2 if what == "softmax_gradient" else E4M3
        factor, amax = torch.ones(1, device=device), torch.zeros(1, device=device)

        emulate = device.type == "cpu"
        do = partial(cast, x, other, targets, factor, amax, what, dtype, with_sums, emulate)
        took = seconds(do, device, rounds)
        moved = rows * columns * (6 if what == "gelu_gradient" else 4)
        print(f"{name:26}{1e6 * took:8.0f}{moved / took / 1e12:8.2f}")


def products(shape: ModelConfig, tokens: int, device: torch.device, rounds: int) -> None:
    width, head_tokens = shape.embd_size, min(tokens, ROWS)
    layers = {"qkv": (tokens, width, 3 * width), "attention's projection": (tokens, width, width)}
    layers |= {"fc": (tokens, width, 4 * width), "proj": (tokens, 4 * width, width)}
    layers["head"] = (head_tokens, width, shape.vocab_size)
    print(f"\n{'product, TFLOP/s':48}{'bf16':>10}{'FP8':>10}")
    one = torch.ones(1, device=device)
    for name, (rows, inputs, outputs) in layers.items():
        of_gradients = E5M2 if name == "head" else E4M3
        of_kinds = {
            "forward": (rows, outputs, inputs, E4M3, True),
            "gradient of the input": (rows, inputs, outputs, of_gradients, False),
            "gradient of the weight": (outputs, inputs, rows, of_gradients, False),
        }
        for kind, (m, n, k, dtype, fast) in of_kinds.items():
            a, b = (torch.randn(size, k, device=device, dtype=torch.bfloat16) for size in (m, n))
            out = torch.float32 if kind == "gradient of the weight" else torch.bfloat16
            a8, b8 = a.to(dtype), b.to(E4M3)
            emulate = device.type == "cpu"
            in_bf16 = seconds(partial(torch.matmul, a, b.T), device, rounds)
            in_fp8 = seconds(partial(product, a8, b8, one, one, out, emulate, fast=fast), device, rounds)
            rates = (2 * m * n * k / took / 1e12 for took in (in_bf16, in_fp8))
            print(f"{f'{name}, {kind}':48}" + "".join(f"{rate:10.3g}" for rate in rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=[*MODEL_SIZES, "tiny"])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    shape, tokens = MODEL_SIZES.get(arguments.size, TINY), arguments.tokens if arguments.size != "tiny" else 64
    rounding(shape, tokens, device, arguments.rounds)
    products(shape, tokens, device, arguments.rounds)


if __name__ == "__main__":
    main()
