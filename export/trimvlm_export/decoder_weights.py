"""The modules that hold the exported decoder's weights; names as in the checkpoint.

Shapes: R rows, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm.profile import ModelSpec
from trimvlm_export.operators import rms_norm


class Attention(nn.Module):
    """Projections of one layer."""

    def __init__(self, model: ModelSpec, biases: Collection[str]) -> None:
        super().__init__()
        width, kv_width = model.head_dim * model.heads, model.head_dim * model.kv_heads
        self.q_proj = nn.Linear(model.hidden, width, bias="q_proj" in biases)
        self.k_proj = nn.Linear(model.hidden, kv_width, bias="k_proj" in biases)
        self.v_proj = nn.Linear(model.hidden, kv_width, bias="v_proj" in biases)
        self.o_proj = nn.Linear(width, model.hidden, bias="o_proj" in biases)


class Mlp(nn.Module):
    """Gated FFN."""

    def __init__(self, model: ModelSpec, biases: Collection[str]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden, model.ffn, bias="gate_proj" in biases)
        self.up_proj = nn.Linear(model.hidden, model.ffn, bias="up_proj" in biases)
        self.down_proj = nn.Linear(model.ffn, model.hidden, bias="down_proj" in biases)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_RD)) * self.up_proj(x_RD))


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_RD: Tensor) -> Tensor:
        return rms_norm(x_RD, self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Any, model: ModelSpec, biases: Collection[str]) -> None:
        super().__init__()
        self.self_attn = Attention(model, biases)
        self.mlp = Mlp(model, biases)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)

    def ffn(self, x_RD: Tensor) -> Tensor:
        """What the FFN adds to the rows."""
        return self.mlp(self.post_attention_layernorm(x_RD))
