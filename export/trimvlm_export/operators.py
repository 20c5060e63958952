"""The decoder's operations in the form in which the exporter finds ONNX's fused operators in them.

Traced at opset 23 they become `RMSNormalization`, `RotaryEmbedding` and `Attention`: the fused lowering (ONNX
Runtime, TensorRT >= 10.15 and 11, TensorRT-RTX). `passes/primitive.py` makes the primitive lowering of it.

Shapes: R query rows, S key rows, H heads, G key/value heads, C head size, D width, V ranked rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OPSET = 23


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, D], weight [D] -> [R, D]; mean of squares in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, R, C], cos and sin [R, C/2] -> [1, H, R, C]; halves rotated, as in Hugging Face's models."""
    return torch.onnx.ops.rotary_embedding(x, cos.unsqueeze(0), sin.unsqueeze(0))


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [1, H, R, C], k and v [1, G, S, C], visible bool [R, S] -> [1, H, R, C]."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


def attention_weights(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """q [1, H, R, C], k [1, G, S, C] -> softmax weights [1, H, R, S] in float32."""
    logits = (q.float() * q.shape[3] ** -0.5) @ repeat_heads(k, q.shape[1]).float().transpose(2, 3)
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
    return torch.softmax(logits, dim=-1)


def top(scores: Tensor, count: int) -> Tensor:
    """int64 [count]: numbers of the highest of `scores` [V]; ties go to the lower number."""
    if torch.compiler.is_exporting():
        return torch.topk(scores, count).indices  # ONNX's TopK breaks ties so; torch.topk leaves them open
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def repeat_heads(kv: Tensor, heads: int) -> Tensor:
    """[1, G, S, C] -> [1, H, S, C]: each key/value head serves H / G query heads."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)
