"""Which GPU a process may compute on: one trainer, evaluation or generation at a time has it, as long as it lives."""

from __future__ import annotations

import argparse
import contextlib
from typing import get_args

import torch

from gpt2core import lock
from gpt2core.distributed import Ranks, pick_device


def claim(ranks: Ranks, held: contextlib.ExitStack, doing: str) -> None:
    """Takes the lock of this rank's GPU. Raises BlockingIOError on all ranks when another process has one of them."""
    if ranks.device.type != "cuda":
        return
    refusal = ""
    try:
        uuid = uuid_of(ranks.device)
        held.enter_context(lock.hold(lock.of_gpu(uuid), what=f"GPU {uuid}", doing=doing))
    except BlockingIOError as error:
        refusal = str(error)
    refusals = [refusal for refusal in ranks.gather(refusal) if refusal]

    def refuse() -> None:
        if refusals:
            raise BlockingIOError(refusals[0])

    ranks.on_main(refuse)


def add_arguments(parser: argparse.ArgumentParser, if_busy: lock.IfBusy) -> None:
    """The flags of what computes for a while on one GPU; `if_busy` is the default."""
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    parser.add_argument(
        "--if_gpu_busy",
        choices=get_args(lock.IfBusy),
        default=if_busy,
        help=f"what to do while a training or an evaluation has each GPU, which is never shared (default: {if_busy})",
    )


def join(device: str, if_busy: lock.IfBusy, held: contextlib.ExitStack, doing: str) -> Ranks:
    """This process alone, on the first GPU that nobody has; or the ranks that torchrun started, each on its own.

    Raises BlockingIOError when they are taken and it was not said to wait or to use the CPU; ranks never wait, for two
    jobs might wait for each other's.
    """
    ranks = Ranks.join(device)
    if ranks.world_size > 1:
        claim(ranks, held, doing)
    elif ranks.device.type == "cuda":
        uuids = [uuid_of(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
        number = lock.take_gpu(uuids, if_busy, held, doing)
        ranks = Ranks(0, 1, pick_device("cpu") if number is None else torch.device("cuda", number))
        if number is not None:
            torch.cuda.set_device(number)
    return ranks


def uuid_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
