"""Where compilers keep their work for the next start, and how the first start fills it by several processes at once.

A kernel of the extra `hopper` takes seconds to compile, on one core; a run wants some ten. `python -m gpt2core.kernel_cache
NAME WIDTH HEADS VOCABULARY` compiles one of them, by trying it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from gpt2core import hopper
from gpt2core.config import ModelConfig
from gpt2core.launch import STARTED_BY, die_with_parent

FOLDERS = {"quack": "QUACK_CACHE_DIR", "flash_attn": "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"}  # by package
TRIALS = {
    "flash_attn": ("flash_attention",),
    # as in quack_kernels.trials, which cannot be imported without QuACK
    "quack": ("gelu_gradient", "linear_gelu", "linear", "residual", "input_gradient", "long_sum", "logits", "loss"),
}
PATIENCE_S = 120.0  # with a kernel, which takes 2 to 5 s on a core of its own; then it is left to whoever uses it


def keep_compiled_kernels() -> None:
    """Has compilers keep their work where it outlives a reboot: by default it lies in /tmp."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-pipeline"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))
    for package, variable in FOLDERS.items():
        os.environ.setdefault(variable, str(cache / package))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    import torch._functorch.config as functorch

    if hasattr(functorch, "autograd_cache_allow_custom_autograd_functions"):  # since torch 2.9; ours are pure
        functorch.autograd_cache_allow_custom_autograd_functions = True


@contextlib.contextmanager
def filling(device: torch.device, model: ModelConfig, packages: Collection[str]) -> Iterator[None]:
    """Compiles what the caches lack of these packages' kernels for this model while the body runs, and until all is there.
    What fails to compile is left to whoever uses it."""
    running = [_start(name, model) for package in packages for name in _missing(package, device)]
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in running:
                process.wait(PATIENCE_S)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _missing(package: str, device: torch.device) -> tuple[str, ...]:
    """Names of the trials whose kernels are to be compiled: all of the package's where its folder is not there yet."""
    folder = os.environ.get(FOLDERS[package])
    is_first_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first_of_machine or not folder or Path(folder).exists() or hopper.why_not(device, package):
        return ()
    return TRIALS[package]


def _start(name: str, model: ModelConfig) -> subprocess.Popen[bytes]:
    sizes = model.embd_size, model.num_heads, model.vocab_size
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2core.kernel_cache", name, *map(str, sizes)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {STARTED_BY: str(os.getpid())},
    )


def _compile(name: str, width: int, heads: int, vocab_size: int) -> None:
    device = torch.device("cuda", 0)
    if name == "flash_attention":
        from gpt2core import cudnn_attention

        cudnn_attention.try_flash(device, heads, width // heads)
    else:
        from gpt2core import quack_kernels

        quack_kernels.trials(device, width, vocab_size)[name]()


if __name__ == "__main__":
    die_with_parent()
    _compile(sys.argv[1], *map(int, sys.argv[2:]))
