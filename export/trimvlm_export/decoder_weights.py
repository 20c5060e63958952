"""The modules that hold the exported decoder's weights; names as in the checkpoint.

Shapes: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm_export.operators import rms_norm


class Attention(nn.Module):
    """Projections of one layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, kv_width = (
            config.head_dim * config.num_attention_heads,
            config.head_dim * config.num_key_value_heads,
        )
        bias = bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)


class Mlp(nn.Module):
    """Gated FFN."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

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

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)

    def ffn(self, x_RD: Tensor) -> Tensor:
        """What the FFN adds to the rows."""
        return self.mlp(self.post_attention_layernorm(x_RD))
