"""The backward pass of attention by FlashAttention-4's kernels for Hopper (Dao et al., the package flash-attn-4).

Import it only where that is installed. At GPT-2's shapes it is faster than cuDNN's, while cuDNN's forward pass is the faster
one (docs/results.md). What goes from one to the other, the output and the logsumexp of each row of scores, is the same.
"""

from __future__ import annotations

import warnings

from torch import Tensor

warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # on compiling, about an argument that is not given
from flash_attn.cute.interface import _flash_attn_bwd  # noqa: E402 - the public function has its own forward pass


def backward(gradient: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, qkv_gradient: Tensor) -> None:
    """Fills qkv_gradient, like qkv (B, T, 3, H, D), by the gradient of causal attention whose output is `out` and that has
    this gradient, both (B, T, H, D), all bf16; with the logsumexps of its scores, (B, H, T) in fp32."""
    q, k, v = qkv.unbind(2)
    dq, dk, dv = qkv_gradient.unbind(2)
    _flash_attn_bwd(q, k, v, out, gradient, log_sums, causal=True, dq=dq, dk=dk, dv=dv)
