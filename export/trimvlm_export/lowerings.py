"""Two lowerings of the same decoder: the operators that one Target's library has, and no others.

* `fused`: opset 23 `Attention`, `RMSNormalization`, `RotaryEmbedding` (ONNX Runtime, TensorRT >= 10.15
  and 11, TensorRT-RTX);
* `primitive`: opset 18 MatMul, Softmax and arithmetic (TensorRT 10.3 on JetPack 6).

Shapes: R query rows, S key rows, H heads, G key/value heads, C head size, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimvlm.bundle import Lowering


@dataclass(frozen=True, kw_only=True)
class Operators:
    """The three operations in which the lowerings differ, and the opset that they need.

    Attributes:
        rms_norm: (x [R, D], weight [D], eps) -> [R, D]; mean of squares in float32.
        rope: (x [1, H, R, C], cos [R, C/2], sin [R, C/2]) -> [1, H, R, C]; halves rotated, as Hugging Face.
        attention: (q [1, H, R, C], k, v [1, G, S, C], visible bool [R, S], scale) -> [1, H, R, C].
    """

    opset: int
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def repeat_heads(kv: Tensor, heads: int) -> Tensor:
    """[1, G, S, C] -> [1, H, S, C]: each key/value head serves H / G query heads."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)


def attention_weights(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax weights [1, H, R, S] in float32."""
    logits = (q.float() * scale) @ repeat_heads(k, q.shape[1]).float().transpose(2, 3)
    return torch.softmax(logits.masked_fill(~visible, torch.finfo(torch.float32).min), dim=-1)


def _primitive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _primitive_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _primitive_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    return attention_weights(q, k, visible, scale).to(v.dtype) @ repeat_heads(v, q.shape[1])


def _fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _fused_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.onnx.ops.rotary_embedding(x, cos.unsqueeze(0), sin.unsqueeze(0))


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)


OPERATORS: dict[Lowering, Operators] = {
    "fused": Operators(opset=23, rms_norm=_fused_norm, rope=_fused_rope, attention=_fused_attention),
    "primitive": Operators(
        opset=18, rms_norm=_primitive_norm, rope=_primitive_rope, attention=_primitive_attention
    ),
}


def default_scale(head_dim: int) -> float:
    """1 / sqrt(C)."""
    return 1.0 / math.sqrt(head_dim)
