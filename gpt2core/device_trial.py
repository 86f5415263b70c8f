"""What a device can do is found by trying it in small, before a run relies on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2core.storage import first_line


def failure_of(attempt: Callable[[], object]) -> str | None:
    """Why `attempt` fails, in one line; None when it does not. Raises torch.OutOfMemoryError, which is no answer."""
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton and cudnn-frontend have errors of their own
        return first_line(error) or type(error).__name__
    return None


def check_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises RuntimeError when a result in bf16 is further from the expected one than a few roundings take it."""
    error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < 0.02:  # one rounding, of 8 bits, is off by 0.002 on the whole; what is compiled wrongly by far more
        raise RuntimeError(f"{what} is off by {error:.1%}")
