"""Where the kernels of the extra `hopper` are to be tried: they are for these GPUs alone, or were measured on them alone."""

from __future__ import annotations

import importlib.util

import torch

PACKAGES = {"flash_attn": "flash-attn-4", "quack": "quack-kernels"}  # by the name that is imported


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def why_not(device: torch.device, package: str) -> str | None:
    """Why a package's kernels are not to be tried on this device."""
    if not is_hopper(device):
        return "it is for Hopper GPUs"
    if not importlib.util.find_spec(package):
        return f"{PACKAGES[package]} is not installed (the extra hopper)"
    return None
