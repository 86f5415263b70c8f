"""What a device can do is found by trying it in small, before a run relies on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
