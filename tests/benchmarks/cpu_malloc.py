"""How much faster CPU training is when glibc keeps freed memory: the demo's model, both ways in one run, as a ratio.

python tests/benchmarks/cpu_malloc.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from gpt2core.config import RECIPES
from gpt2core.launch import KEEP_FREED_MEMORY

STEPS = 20


def tokens_per_sec() -> float:
    import torch

    from gpt2core.model import GPT
    from gpt2core.optim import build_optimizer

    recipe = RECIPES["demo"]
    model = GPT(recipe.model)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, recipe.train)
    tokens = torch.randint(0, 50257, (recipe.train.mini_batch_size, recipe.model.context_length))
    for step in range(STEPS + 2):
        if step == 2:  # the first two warm up
            started = time.perf_counter()
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()
    return STEPS * tokens.numel() / (time.perf_counter() - started)


def measure(environment: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--one"]
    return float(
        subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(tokens_per_sec())
    else:
        plain, kept = measure({}), measure(KEEP_FREED_MEMORY)
        print(
            f"glibc's default {plain:,.0f} tokens/s, freed memory kept {kept:,.0f} tokens/s, ratio {kept / plain:.2f}"
        )
