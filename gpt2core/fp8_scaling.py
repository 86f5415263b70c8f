"""The factors of the recipe `delayed`: a tensor is rounded by what its largest magnitudes were in the updates before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2core.distributed import Ranks
from gpt2core.fp8_cast import E4M3, power_of_two
from gpt2core.fp8_linear import Scale

HISTORY = 16  # updates that are looked back on
HEADROOM = 2.0  # for a magnitude to outgrow them; costs one of e4m3's 18 and of e5m2's 32 powers of two


class DelayedScaling:
    """The scales of the blocks' layers: for each layer that of its input, then that of its output's gradient.

    Magnitudes are the largest over all micro-steps and ranks. `gradients` is the type they are rounded to; `tokens_per_rank`, of
    a step, tells their size.
    """

    def __init__(
        self, scales: dict[str, tuple[Scale, Scale]], gradients: torch.dtype, tokens_per_rank: int, ranks: Ranks
    ) -> None:
        self.layers, self.tokens_per_rank, self.ranks = list(scales), tokens_per_rank, ranks
        pairs = list(scales.values())
        self.factors, self.inverses, self.amaxes = (
            [scale[part] for pair in pairs for scale in pair] for part in range(3)
        )
        largest = [torch.finfo(dtype).max for dtype in (E4M3, gradients)]
        self.largest = torch.tensor(largest * len(pairs), device=ranks.device)
        self.history = torch.zeros(HISTORY, len(self.largest), device=ranks.device)
        self.saturated = torch.zeros((), device=ranks.device)  # how often a tensor outgrew its factor, since last read
        self.is_calibrated = False

    def updated(self, is_bad: Tensor) -> None:
        """After an update of the weights, which was left out where `is_bad` is above 0; that is decided on the device."""
        amax = self._largest_of_all_ranks()
        amax = torch.where(amax.isfinite(), amax, self.history[0])
        left_out = is_bad > 0
        self.saturated += torch.where(left_out, 0, (amax * torch.cat(self.factors) > self.largest).sum())
        self._look_back_on(torch.where(left_out, self.history, torch.cat([amax[None], self.history[:-1]])))

    def calibrated(self) -> None:
        """After a pass that rounded by each tensor's own magnitude. Of one that was not finite nothing is known: it is as
        if it had been 0, until the next update."""
        amax = self._largest_of_all_ranks()
        self._look_back_on(torch.where(amax.isfinite(), amax, 0.0).expand_as(self.history).clone())

    def forget(self) -> None:
        """What was measured since the last update counts no more."""
        torch._foreach_zero_(self.amaxes)

    def _largest_of_all_ranks(self) -> Tensor:
        return self.ranks.max(torch.cat(self.amaxes))

    def _look_back_on(self, history: Tensor) -> None:
        self.history = history
        factors = power_of_two(self.largest / HEADROOM, history.amax(0))
        torch._foreach_copy_(self.factors, factors.split(1))
        torch._foreach_copy_(self.inverses, factors.reciprocal().split(1))
        self.is_calibrated = True
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "tokens_per_rank": self.tokens_per_rank, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state. One of another model or precision, or with gradients of another size, does not fit:
        then it is to be calibrated anew."""
        fits = (state.get("layers"), state.get("tokens_per_rank")) == (self.layers, self.tokens_per_rank)
        self.is_calibrated = False
        if fits:
            self._look_back_on(state["history"].to(self.history.device))
