"""Keys and values of the tokens that a model has read, so that each new token is computed once.

Shapes in comments: B rows of text, T new tokens, S stored ones, H heads, D their size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.config import ModelConfig


class KeyValueCache:
    """Room for `capacity` tokens a row. Rows of different lengths are padded on the left: `padding` (B,) tokens of a row
    are no part of its text, and nothing that counts looks at them."""

    def __init__(self, config: ModelConfig, padding: Tensor, capacity: int, dtype: torch.dtype) -> None:
        size = config.embd_size // config.num_heads
        shape = (config.num_layers, 2, len(padding), config.num_heads, capacity, size)
        self.stored = torch.empty(shape, dtype=dtype, device=padding.device)
        self.length = 0  # tokens that all layers have stored
        self.padding = padding
        self.is_padded = bool(padding.any())
        self.last_position = config.context_length - 1

    def positions(self, count: int) -> Tensor:
        """Places in their texts, (B, T), of the `count` tokens to be read next; padding and what is past the model's
        context get one that exists."""
        columns = torch.arange(self.length, self.length + count, device=self.padding.device)
        return (columns - self.padding[:, None]).clamp(0, self.last_position)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Stores the keys and values of new tokens, (B, T, 3, H, D), and attends to all stored: (B, T, H, D)."""
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, D)
        new = q.shape[2]
        end = self.length + new
        keys, values = self.stored[layer, :, :, :, :end]  # each (B, H, S, D)
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        if not self.is_padded and (new == 1 or self.length == 0):
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=new > 1)
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._visible(new))
        if layer == len(self.stored) - 1:
            self.length = end
        return y.transpose(1, 2)

    def _visible(self, new: int) -> Tensor:
        """Which stored tokens each new one may see, (B, 1, T, S): its text up to itself; padding sees itself alone, for a
        row of nothing would be NaN."""
        stored = torch.arange(self.length + new, device=self.padding.device)
        asking = stored[self.length :, None]  # (T, 1)
        of_the_text = (stored >= self.padding[:, None])[:, None]  # (B, 1, S)
        return ((stored <= asking) & (of_the_text | (stored == asking)))[:, None]
