"""Training in 8-bit floating point: the linear layers' three products (forward, gradient of the input, gradient of the
weight) run on numbers of 8 bits, with fp32 sums. No library but PyTorch takes part.

In 8 bits: the inputs, weights and output gradients of the blocks' linear layers (`fp8`) and of the head (`fp8` and
`fp8_head`). In bf16 or fp32 as without it: attention, whose products are of activations alone and whose softmax is
sensitive; LayerNorm, GELU and the residual stream, which are no products; embeddings; the loss; the master weights, their
gradients and the optimizer. Evaluation and validation compute in bf16, as the model will be used.

How the factors are found before rounding (`--fp8_recipe`):

delayed     from the largest magnitudes of the last updates, with room for them to double
tensorwise  from the largest magnitude of the tensor itself, for which it is read once more
rowwise     from that of each row; the gradient of the weight, which sums over the rows, stays in bf16

The head's factors are always known or cheap: its gradient is softmax - onehot, within -1 and 1, and its input is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import fused_loss
from gpt2core.config import ModelConfig, TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.fp8_cast import E4M3, E5M2, MULTIPLE, cast, power_of_two, product
from gpt2core.fp8_linear import MLP8, How, Linear8, RowwiseLinear8, Scale, Weight, head_loss, rows_rounded
from gpt2core.kernels import linear, mean_loss, mlp
from gpt2core.model import GPT, Block, Linear

HISTORY = 16  # updates whose largest magnitudes the delayed recipe looks back on
ROOM = 2.0  # for a magnitude to grow beyond these; costs one of e4m3's 18 and of e5m2's 32 powers of two
CAPABILITY = (8, 9)  # the first with FP8 tensor cores: Ada; then Hopper 9.0, Blackwell 10.x and 12.x


class LinearLayer:
    """A linear layer in 8 bits, with its weight as last rounded and how its input and its gradient are scaled."""

    def __init__(self, fp8: FP8, layer: Linear) -> None:
        self.fp8 = fp8
        self.weight = Weight.like(layer.weight, fp8.rowwise)
        self.of_x, self.of_gradient = (Scale.new(layer.weight.device) for _ in range(2))

    def __call__(self, x: Tensor, master: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None or not torch.is_grad_enabled():
            return linear(x, master, bias)
        rows, how = x.flatten(0, -2), self.fp8.how
        out: Tensor
        if self.fp8.rowwise:
            out = RowwiseLinear8.apply(rows, master, bias, self.weight, how.emulate)
        else:
            out = Linear8.apply(rows, master, bias, self.weight, self.of_x, self.of_gradient, how)
        return out.view(*x.shape[:-1], -1)


class MLPLayers:
    """The two linear layers of a block's MLP and the GELU between them."""

    def __init__(self, fc: LinearLayer, proj: LinearLayer) -> None:
        self.fc, self.proj = fc, proj

    def __call__(self, x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return mlp(x, fc, fc_bias, proj, proj_bias)
        if self.fc.fp8.rowwise:
            return self.proj(F.gelu(self.fc(x, fc, fc_bias), approximate="tanh"), proj, proj_bias)
        out: Tensor = MLP8.apply(
            *(x.flatten(0, -2), fc, fc_bias, proj, proj_bias),
            (self.fc.weight, self.proj.weight),
            (self.fc.of_x, self.proj.of_x),
            (self.fc.of_gradient, self.proj.of_gradient),
            self.fc.fp8.how,
        )
        return out.view_as(x)


class FP8:
    """A model's training in 8 bits: puts its layers in the place of the model's own, and keeps what they need between updates.

    To be told of every update, and of weights that were loaded; to be calibrated before the first micro-step unless a
    state was loaded.
    """

    def __init__(self, model: GPT, train: TrainConfig, ranks: Ranks, emulate: bool) -> None:
        self.ranks = ranks
        self.recipe, self.head_only = train.fp8_recipe, train.precision == "fp8_head"
        self.rowwise, self.delayed = self.recipe == "rowwise", self.recipe == "delayed"
        self.how = self._how = How(dynamic=not self.delayed, emulate=emulate)
        self.layers: dict[str, LinearLayer] = {}
        self.masters: list[Tensor] = [model.lm_head.weight]
        self.head = Weight.like(model.lm_head.weight, rowwise=False)
        model.kernels = replace(model.kernels, mean_loss=self._mean_loss)
        if not self.head_only:
            self._take_blocks(model)
        self.is_calibrated = not self.delayed or self.head_only
        sites = len(self._scales())
        self.history = torch.zeros(HISTORY, sites, device=model.lm_head.weight.device)
        self.saturated = torch.zeros(
            (), device=self.history.device
        )  # tensors that outgrew their factor, since last read
        largest = [torch.finfo(dtype).max for dtype in (E4M3, E5M2)]
        self.largest = torch.tensor(largest * (sites // 2), device=self.history.device)
        self.weights_changed()

    def _take_blocks(self, model: GPT) -> None:
        for number, block in enumerate(model.transformer.h):
            assert isinstance(block, Block)
            attn, mlp_ = block.attn, block.mlp
            layers = {
                "attn.c_attn": attn.c_attn,
                "attn.c_proj": attn.c_proj,
                "mlp.c_fc": mlp_.c_fc,
                "mlp.c_proj": mlp_.c_proj,
            }
            taken = {name: LinearLayer(self, layer) for name, layer in layers.items()}
            for name, layer in layers.items():
                layer.kernels = replace(layer.kernels, linear=taken[name])
            mlp_.kernels = replace(mlp_.kernels, mlp=MLPLayers(taken["mlp.c_fc"], taken["mlp.c_proj"]))
            self.layers |= {f"h.{number}.{name}": layer for name, layer in taken.items()}
            self.masters += [layer.weight for layer in layers.values()]

    def _mean_loss(self, x: Tensor, master: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return mean_loss(x, master, targets)
        return head_loss(x, master, self.head, targets, self.how.emulate)

    def _scales(self) -> list[Scale]:
        return [scale for layer in self.layers.values() for scale in (layer.of_x, layer.of_gradient)]

    def describe(self) -> str:
        what = "the head" if self.head_only else "the blocks' linear layers and the head"
        recipe = "" if self.head_only else f" ({self.recipe} scaling)"
        return f"precision: {what} in FP8{recipe}, all else in bf16{', EMULATED' if self.how.emulate else ''}"

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Rounds the weights anew."""
        weights = [self.head, *(layer.weight for layer in self.layers.values())]
        if self.rowwise:
            for master, weight in zip(self.masters[1:], weights[1:], strict=True):
                for into, inverse, matrix in zip(weight[:2], weight[2:], (master, master.T), strict=True):
                    rounded, found = rows_rounded(matrix, E4M3)
                    into.copy_(rounded), inverse.copy_(found)
            weights = weights[:1]
        masters = self.masters[: len(weights)]
        amax = torch.stack(torch._foreach_norm(masters, torch.inf))
        factors = power_of_two(torch.finfo(E4M3).max, amax)
        unused = torch.zeros_like(amax[:1])
        for master, weight, factor in zip(masters, weights, factors.split(1), strict=True):
            row, column, _ = cast(master, None, None, factor, unused, "itself", False, False, self.how.emulate)
            weight.row_major.copy_(row)
            weight.column_major.copy_(column)
            weight.row_inverse.copy_(factor.reciprocal())
            weight.column_inverse.copy_(weight.row_inverse)

    @torch.no_grad()
    def updated(self) -> None:
        """After an update of the weights: they are rounded anew, and the next step's factors are set. All ranks agree on them."""
        self.weights_changed()
        if not self.layers or not self.delayed:
            return
        scales = self._scales()
        amax = self._largest_of_all_ranks()
        amax = torch.where(amax.isfinite(), amax, self.history[0])
        factors = torch.cat([scale.factor for scale in scales])
        self.saturated += (amax * factors > self.largest).sum()
        self._look_back_on(torch.cat([amax[None], self.history[:-1]]))

    def calibrate(self, loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
        """Finds the first factors by one pass, forward and backward, with factors from the tensors themselves."""
        self._forget_amax()
        self.how = self.how._replace(dynamic=True)
        torch.autograd.grad(loss(), parameters)
        self.how = self._how
        self._look_back_on(self._largest_of_all_ranks().expand_as(self.history).clone())

    def _largest_of_all_ranks(self) -> Tensor:
        return self.ranks.max(torch.cat([scale.amax for scale in self._scales()]))

    def _look_back_on(self, history: Tensor) -> None:
        self.history = history
        self.is_calibrated = True
        factors = power_of_two(self.largest / ROOM, history.amax(0))
        for scale, factor in zip(self._scales(), factors.split(1), strict=True):
            scale.factor.copy_(factor)
            scale.inverse.copy_(factor.reciprocal())
        self._forget_amax()

    def _forget_amax(self) -> None:
        for scale in self._scales():
            scale.amax.zero_()

    def read_saturated(self) -> int:
        """How often a tensor outgrew its factor, so that its largest numbers were cut, since this was last asked."""
        count = int(self.saturated.item())
        self.saturated.zero_()
        return count

    def state_dict(self) -> dict[str, Any]:
        """What the next step's factors come from; nothing but the weights themselves in the other recipes."""
        if not self.delayed or not self.is_calibrated:
            return {}
        return {"layers": list(self.layers), "world_size": self.ranks.world_size, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state, after the weights were loaded.

        One of another precision or recipe, or of another number of ranks, whose gradients are of another size, is calibrated anew.
        """
        self.weights_changed()
        fits = state.get("layers") == list(self.layers) and state.get("world_size") == self.ranks.world_size
        self.is_calibrated = not self.delayed or self.head_only
        if fits and not self.is_calibrated:
            self._look_back_on(state["history"].to(self.history.device))


def equip(model: GPT, train: TrainConfig, ranks: Ranks) -> FP8 | None:
    """Lets the model train as `precision` says; None where that is not in 8 bits.

    Raises ValueError where the device or the model's shape does not allow it, unless --kernels plain asks to emulate it.
    """
    if not train.precision.startswith("fp8"):
        return None
    if refused := refusal(train, model.config, ranks.device):
        raise ValueError(refused)
    return FP8(model, train, ranks, emulate=train.kernels == "plain")


def refusal(train: TrainConfig, model: ModelConfig, device: torch.device) -> str | None:
    """What stands against the FP8 that is asked for, and what to do; None when nothing does."""
    emulate = train.kernels == "plain"
    if why := why_not(device, model, train.fp8_recipe, emulate):
        instead = "" if emulate else ", or --kernels plain, which emulates FP8 slowly on any device"
        return f"precision {train.precision}: {why}; use --precision bf16{instead}"
    return None


def why_not(device: torch.device, model: ModelConfig, recipe: str, emulate: bool = False) -> str | None:
    """Why a model cannot train in FP8 on this device; None when it can: small products are tried."""
    for name, size in (("embd_size", model.embd_size), ("vocab_size", model.vocab_size)):
        if size % MULTIPLE:
            return f"{name} {size} is not a multiple of {MULTIPLE}, as FP8 products need"
    if emulate:
        return None
    needed = "it needs an NVIDIA GPU of compute capability 8.9 (Ada), 9.0 (Hopper), 10.x or 12.x (Blackwell)"
    if device.type != "cuda":
        return f"{needed}, and this is {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{needed}, and {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    if not fused_loss.HAS_TRITON:
        return "Triton is not installed"
    try:
        _try_products(device, recipe == "rowwise")
    except (RuntimeError, ValueError, AttributeError) as error:
        return f"torch {torch.__version__} cannot multiply in FP8 on {torch.cuda.get_device_name(device)} ({error})"
    return None


def _try_products(device: torch.device, rowwise: bool) -> None:
    """Raises what PyTorch raises where a product of the kinds that training needs cannot be had."""
    number = torch.ones(1, device=device)
    inverse = torch.ones(MULTIPLE, 1, device=device) if rowwise else number
    a, b = (torch.zeros(MULTIPLE, MULTIPLE, device=device, dtype=dtype) for dtype in (E4M3, E5M2))
    bias = torch.zeros(MULTIPLE, device=device, dtype=torch.bfloat16)
    product(a, a, inverse, inverse, torch.bfloat16, emulate=False, bias=bias, fast=True)
    product(b, a, inverse, inverse, torch.bfloat16, emulate=False)
    product(b, a, number, number, torch.float32, emulate=False)
    torch.cuda.synchronize(device)
