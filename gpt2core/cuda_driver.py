"""The NVIDIA GPUs that a new process sees, by their UUIDs, as the CUDA driver has them.

    python -m gpt2core.cuda_driver

torch says the same, after the seconds that it takes to load.
"""

from __future__ import annotations

import ctypes
import uuid


def visible_gpus() -> list[str]:
    """In the order of CUDA's numbers, after CUDA_VISIBLE_DEVICES; none without a driver, or with one that fails."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_uuid(driver, number) for number in range(count.value)]


def _uuid(driver: ctypes.CDLL, number: int) -> str:
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetUuid(raw, device):
        raise OSError(f"the CUDA driver counts a GPU {number} and does not know it")
    return str(uuid.UUID(bytes=bytes(raw)))


if __name__ == "__main__":
    print("\n".join(visible_gpus()))
