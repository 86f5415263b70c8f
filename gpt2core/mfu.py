"""Model FLOPs utilization: what a run computes beside what the device could (Chowdhery et al. 2022, PaLM, appendix B)."""

from __future__ import annotations

import re

import torch

# Dense bf16 FLOP/s by the vendor's datasheets, without sparsity; the first name whose words a device's name holds counts.
PEAK_FLOPS: dict[str, float | None] = {
    "NVL": None,  # slower than what they are named after; not looked up
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Peak of a device of this name, such as 'NVIDIA H100 80GB HBM3', in FLOP/s; None where it is not known."""
    words = re.split(r"[\s-]+", name)
    return next((peak for known, peak in PEAK_FLOPS.items() if set(known.split()) <= set(words)), None)
