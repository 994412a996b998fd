"""Causal attention: each position looks at itself and what came before (§2; [1] eq. 1 with GPT's mask).

    output_i = Σ_{j ≤ i} softmax_j( q_i·k_j / √d ) v_j

With fewer queries than keys the queries are the last positions: that is how a key/value cache is read.

Symbols: B batch, Tq queries, T keys, d head_dim.
"""
import math

import torch
from torch import Tensor


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In plain torch: query (B, heads, Tq, d), key and value (B, heads, T, d) → (B, heads, Tq, d).

    The softmax is taken in float32 at least. Differentiable. Raises ValueError for other shapes or Tq > T.
    """
    if (query.ndim != 4 or key.shape != value.shape
            or query.shape[:2] + query.shape[3:] != key.shape[:2] + key.shape[3:]
            or query.shape[2] > key.shape[2]):
        raise ValueError("causal_attention needs query (B, heads, Tq, d) and key, value (B, heads, T, d) "
                         f"with Tq ≤ T, not {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    queries, keys = query.shape[2], key.shape[2]
    scores = query / math.sqrt(query.shape[3]) @ key.transpose(2, 3)  # (B, heads, Tq, T)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)  # (Tq, T)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return weights @ value  # (B, heads, Tq, d)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, heads, Tq, d), key and value (B, heads, T, d) → (B, heads, Tq, d); differentiable."""
    return causal_attention_reference(query, key, value)
