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

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import fused_loss, kernels
from gpt2core.config import ModelConfig, TrainConfig
from gpt2core.device_trial import failure_of
from gpt2core.distributed import Ranks
from gpt2core.fp8_cast import E4M3, E5M2, MULTIPLE, cast_into, check_kernels, power_of_two, product
from gpt2core.fp8_linear import MLP8, Linear8, Mode, RowwiseLinear8, Scale, Weight, head_loss
from gpt2core.fp8_scaling import DelayedScaling
from gpt2core.model import GPT, Block, Linear

CAPABILITY = (8, 9)  # the first with FP8 tensor cores: Ada; then Hopper 9.0, Blackwell 10.x and 12.x


class LinearLayer:
    """A linear layer in 8 bits, with its weight as last rounded and how its input and its gradient are scaled."""

    def __init__(self, fp8: FP8, layer: Linear) -> None:
        self.fp8 = fp8
        self.weight = Weight.like(layer.weight, fp8.rowwise)
        self.of_x, self.of_gradient = (Scale.new(layer.weight.device) for _ in range(2))

    def __call__(self, x: Tensor, master: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if bias is None or not torch.is_grad_enabled():
            return kernels.linear(x, master, bias, residual)
        rows, mode = x.flatten(0, -2), self.fp8.mode
        out: Tensor
        if self.fp8.rowwise:
            out = RowwiseLinear8.apply(rows, master, bias, self.weight, mode)
        else:
            out = Linear8.apply(rows, master, bias, self.weight, self.of_x, self.of_gradient, mode)
        out = out.view(*x.shape[:-1], -1)
        return out if residual is None else residual + out


class MLPLayers:
    """The two linear layers of a block's MLP and the GELU between them."""

    def __init__(self, fc: LinearLayer, proj: LinearLayer) -> None:
        self.fc, self.proj = fc, proj

    def __call__(
        self, x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor, residual: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return kernels.mlp(x, fc, fc_bias, proj, proj_bias, residual)
        if self.fc.fp8.rowwise:
            return self.proj(F.gelu(self.fc(x, fc, fc_bias), approximate="tanh"), proj, proj_bias, residual)
        out: Tensor = MLP8.apply(
            *(x.flatten(0, -2), fc, fc_bias, proj, proj_bias),
            (self.fc.weight, self.proj.weight),
            (self.fc.of_x, self.proj.of_x),
            (self.fc.of_gradient, self.proj.of_gradient),
            self.fc.fp8.mode,
        )
        return residual + out.view_as(x)


class FP8:
    """A model's training in 8 bits: puts its layers in the place of the model's own, and keeps what they need between
    updates. To be told of every update and of weights that were loaded.
    """

    def __init__(self, model: GPT, train: TrainConfig, ranks: Ranks, emulate: bool) -> None:
        self.recipe, self.head_only = train.fp8_recipe, train.precision == "fp8_head"
        self.rowwise = self.recipe == "rowwise"
        self.gradients = train.fp8_gradients
        gradients = {"e4m3": E4M3, "e5m2": E5M2}[self.gradients]
        self.mode = Mode(dynamic=self.recipe == "tensorwise", emulate=emulate, gradients=gradients)
        self.head_master, self.head = model.lm_head.weight, Weight.like(model.lm_head.weight, rowwise=False)
        model.kernels = replace(model.kernels, mean_loss=self._mean_loss)
        self.masters: list[Tensor] = []
        self.layers: dict[str, LinearLayer] = {}
        self.scaling: DelayedScaling | None = None
        if not self.head_only:
            for number, block in enumerate(model.transformer.h):
                assert isinstance(block, Block)
                self._take(block, f"h.{number}")
            if self.recipe == "delayed":
                scales = {name: (layer.of_x, layer.of_gradient) for name, layer in self.layers.items()}
                self.scaling = DelayedScaling(scales, gradients, train.total_batch_size // ranks.world_size, ranks)
        self.weights_changed()

    def _take(self, block: Block, name: str) -> None:
        attn, mlp = block.attn, block.mlp
        layers = {
            "attn.c_attn": attn.c_attn,
            "attn.c_proj": attn.c_proj,
            "mlp.c_fc": mlp.c_fc,
            "mlp.c_proj": mlp.c_proj,
        }
        for own_name, layer in layers.items():
            taken = self.layers[f"{name}.{own_name}"] = LinearLayer(self, layer)
            layer.kernels = replace(layer.kernels, linear=taken)
            self.masters.append(layer.weight)
        fc, proj = (self.layers[f"{name}.mlp.{own_name}"] for own_name in ("c_fc", "c_proj"))
        mlp.kernels = replace(mlp.kernels, mlp=MLPLayers(fc, proj))

    def _mean_loss(self, x: Tensor, master: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return kernels.mean_loss(x, master, targets)
        return head_loss(x, master, self.head, targets, self.mode.emulate)

    def describe(self) -> str:
        what = "the head" if self.head_only else "the blocks' linear layers and the head"
        recipe = "" if self.head_only else f" ({self.recipe} scaling, gradients in {self.gradients})"
        instead = ", EMULATED" if self.mode.emulate else ", in place of the kernels above for them"
        return f"precision: {what} in FP8{recipe}{instead}; all else in bf16"

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Rounds the weights anew."""
        masters, weights = [self.head_master], [self.head]
        layers = [layer.weight for layer in self.layers.values()]
        if self.rowwise:
            for master, weight in zip(self.masters, layers, strict=True):
                weight.round_rows(master)
        else:
            masters, weights = masters + self.masters, weights + layers
        amax = torch.stack(torch._foreach_norm(masters, torch.inf))
        factors = power_of_two(torch.finfo(E4M3).max, amax)
        unused = torch.zeros_like(amax[:1])
        for master, weight, factor in zip(masters, weights, factors.split(1), strict=True):
            layouts = weight.row_major, weight.column_major
            cast_into(*layouts, master, None, None, factor, unused, "itself", False, self.mode.emulate)
        inverses = factors.reciprocal().split(1)
        torch._foreach_copy_([weight.row_inverse for weight in weights], inverses)
        torch._foreach_copy_([weight.column_inverse for weight in weights], inverses)

    @torch.no_grad()
    def updated(self, is_bad: Tensor) -> None:
        """After an update of the weights, which was left out where `is_bad` is above 0."""
        self.weights_changed()
        if self.scaling:
            self.scaling.updated(is_bad)

    @property
    def is_calibrated(self) -> bool:
        return self.scaling is None or self.scaling.is_calibrated

    def calibrate(self, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        """Finds the first factors by one pass, forward and backward, that rounds by each tensor's own magnitude."""
        assert self.scaling
        self.scaling.forget()
        self.mode, usual = self.mode._replace(dynamic=True), self.mode
        torch.autograd.grad(loss(), parameters)
        self.mode = usual
        self.scaling.calibrated()

    def take_saturated(self) -> Tensor:
        """How often a tensor outgrew its factor, so that its largest numbers were cut, since this was last asked; still on
        the device. Only where there is `scaling`."""
        assert self.scaling is not None
        count = self.scaling.saturated.clone()
        self.scaling.saturated.zero_()
        return count

    def state_dict(self) -> dict[str, Any]:
        """What the next step's factors come from; nothing where that is the tensors themselves."""
        return self.scaling.state_dict() if self.scaling and self.scaling.is_calibrated else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state. The weights are loaded before, and weights_changed called."""
        if self.scaling:
            self.scaling.load_state_dict(state)


def equip(model: GPT, train: TrainConfig, ranks: Ranks) -> FP8 | None:
    """Lets the model train as `precision` says; None where that is not in 8 bits.

    Raises ValueError where the device or the model's shape does not allow it, unless --kernels plain asks to emulate it.
    """
    if not train.precision.startswith("fp8"):
        return None
    refuse_fp8(train, model.config, ranks.device)
    return FP8(model, train, ranks, emulate=train.kernels == "plain")


def refuse_fp8(train: TrainConfig, model: ModelConfig, device: torch.device) -> None:
    """Raises ValueError, saying what to do, when FP8 is asked for and cannot be had on this device."""
    if not train.precision.startswith("fp8"):
        return
    if why := why_not(device, model, train.fp8_recipe, emulate=train.kernels == "plain"):
        can_emulate = why_not(device, model, train.fp8_recipe, emulate=True) is None
        instead = ", or --kernels plain, which emulates FP8, slowly, without such hardware" if can_emulate else ""
        raise ValueError(f"precision {train.precision}: {why}; use --precision bf16{instead}")


@functools.cache
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
    name = torch.cuda.get_device_name(device)
    cannot = f"torch {torch.__version__} cannot compute in FP8 on {name}: "
    if failure := failure_of(lambda: check_kernels(device)):
        return f"{cannot}{failure}; TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH may name a newer ptxas"
    if failure := failure_of(lambda: _try_products(device, rowwise=False)):
        return cannot + failure
    if recipe == "rowwise" and (failure := failure_of(lambda: _try_products(device, rowwise=True))):
        return (
            f"torch {torch.__version__} cannot scale rows on {name} ({failure}), but --fp8_recipe delayed works there"
        )
    return None


def _try_products(device: torch.device, rowwise: bool) -> None:
    """Raises what PyTorch raises where a product of the kinds that training needs cannot be had."""
    number = torch.ones(1, device=device)
    inverse = torch.ones(MULTIPLE, 1, device=device) if rowwise else number
    a, b = (torch.zeros(MULTIPLE, MULTIPLE, device=device, dtype=dtype) for dtype in (E4M3, E5M2))
    bias = torch.zeros(MULTIPLE, device=device, dtype=torch.bfloat16)
    product(a, a, inverse, inverse, torch.bfloat16, emulate=False, bias=bias, fast=True)
    for gradient in (a, b):
        product(gradient, a, inverse, inverse, torch.bfloat16, emulate=False)
        product(gradient, a, number, number, torch.float32, emulate=False)
    torch.cuda.synchronize(device)
