"""Where compilers keep their work for the next start, and how the first start fills it by several processes at once.

A kernel of the extra `hopper` takes seconds to compile, on one core; a run wants some ten. `python -m gpt2core.kernel_cache
PARENT NAME WIDTH HEADS VOCABULARY` compiles one of them, by trying it, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpt2core import hopper
from gpt2core.config import ModelConfig
from gpt2core.launch import tie_to_parent

FOLDERS = {"quack": "QUACK_CACHE_DIR", "flash_attn": "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"}  # by package
TRIALS = {
    "flash_attn": ("flash_attention",),
    # as in quack_kernels.product_trials, which cannot be imported without QuACK, and its loss
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
    """Compiles these packages' kernels for this model while the body runs, and until all are there, if no start before has
    tried to. What fails to compile is left to whoever uses it."""
    names = [name for package in packages if _is_first(package, device, model) for name in TRIALS[package]]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            running.append(_start(name, model))
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in running:
                process.wait(PATIENCE_S)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _is_first(package: str, device: torch.device, model: ModelConfig) -> bool:
    """Whether nobody has yet compiled the package's kernels for such a model and GPU into its cache; a file there says so to
    those who ask later."""
    folder = os.environ.get(FOLDERS[package])
    if not folder or hopper.why_not(device, package):
        return False
    try:
        installed = version(hopper.PACKAGES[package])
        Path(folder).mkdir(parents=True, exist_ok=True)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"compiled_ahead_{installed}_{'x'.join(_sizes(model))}_sm{major}{minor}"
        (Path(folder) / name).touch(exist_ok=False)
    except (PackageNotFoundError, OSError):  # it is there, or cannot be
        return False
    return True


def _sizes(model: ModelConfig) -> list[str]:
    return [str(size) for size in (model.embd_size, model.num_heads, model.vocab_size)]


def _start(name: str, model: ModelConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2core.kernel_cache", str(os.getpid()), name, *_sizes(model)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _compile(name: str, width: int, heads: int, vocab_size: int) -> None:
    device = torch.device("cuda", 0)
    if name == "flash_attention":
        from gpt2core import cudnn_attention

        cudnn_attention.try_flash(device, heads, width // heads)
        return
    from gpt2core import quack_kernels

    if name == "loss":
        quack_kernels.try_loss(device, vocab_size)
    else:
        quack_kernels.product_trials(device, width)[name]()


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    _compile(sys.argv[2], *map(int, sys.argv[3:]))
