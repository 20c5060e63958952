"""The router in torch: what is trained and what is exported (Pruning All-Rounder, section 4).

One transformer block over the rows of the prompt and one learnable token per candidate layer, in the order
[visual; text; layers]. The paper's ~40 million parameters need a bottleneck: one block as wide as a 7B model
has 202 million. So embeddings are projected to a smaller width first.

Shapes: T text rows, N visual rows, R layer tokens, S all rows, D model width, W router width, H heads, C head
size, F FFN width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm.filling import NOWHERE
from trimvlm.router_spec import RouterSpec

EPS = 1e-6
THETA = 10_000.0  # of the rotary embedding


class Router(nn.Module):
    """The network, in float32.

    Args:
        hidden: width of the model, D.
        layers: decoder layers of the model.
    """

    inv_freq: Tensor

    def __init__(self, spec: RouterSpec, hidden: int, layers: int) -> None:
        super().__init__()
        self.heads, self.causal = spec.heads, spec.mask == "causal"
        width, ffn = spec.width, 4 * spec.width
        self.input = nn.Linear(hidden, width, bias=False)
        self.layer_tokens = nn.Parameter(torch.zeros(layers - spec.first, width))
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.ffn_norm = nn.Parameter(torch.ones(width))
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, width, bias=False)
        self.norm = nn.Parameter(torch.ones(width))
        self.token_head = nn.Linear(width, 1, bias=False)
        self.layer_head = nn.Linear(width, 1, bias=False)
        size = spec.width // spec.heads
        angles = THETA ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        self.register_buffer("inv_freq", angles, persistent=False)

    def forward(
        self, text: Tensor, visual: Tensor, text_positions: Tensor, visual_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of one prompt.

        Args:
            text: token embeddings float32 [T, D].
            visual: projector outputs float32 [N, D]; no row sees one whose position is `NOWHERE`.
            text_positions, visual_positions: int64 [T], [N], in the full prompt.

        Returns:
            Log-odds float32 of the visual rows [N] and of the layers [R].
        """
        count, layers = visual.shape[0], self.layer_tokens.shape[0]
        after = text_positions[-1:] + 1 + torch.arange(layers, device=text_positions.device)
        positions_S = torch.cat((visual_positions, text_positions, after))
        x = torch.cat((self.input(torch.cat((visual, text))), self.layer_tokens))
        x = x + self._attention(_norm(x, self.attention_norm), positions_S)
        y = _norm(x, self.ffn_norm)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        x = _norm(x, self.norm)
        return self.token_head(x[:count])[:, 0], self.layer_head(x[-layers:])[:, 0]

    def _attention(self, x_SW: Tensor, positions_S: Tensor) -> Tensor:
        angles = positions_S.float()[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()

        def heads(rows_SW: Tensor) -> Tensor:
            return rows_SW.unflatten(-1, (self.heads, -1)).transpose(0, 1)

        q, k, v = (heads(part(x_SW)) for part in (self.query, self.key, self.value))
        scores_HSS = (_rotate(q, cos, sin) * q.shape[-1] ** -0.5) @ _rotate(k, cos, sin).transpose(1, 2)
        unseen = positions_S[None, :] >= NOWHERE
        if self.causal:
            unseen = positions_S[None, :] > positions_S[:, None]
        scores_HSS = scores_HSS.masked_fill(unseen, torch.finfo(torch.float32).min)
        mixed_HSC = torch.softmax(scores_HSS, dim=-1) @ v
        return self.output(mixed_HSC.transpose(0, 1).flatten(1))


class PromptRouter(nn.Module):
    """The router with the checkpoint's embedding table: the graph that a bundle holds."""

    def __init__(self, router: Router, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = router
        self.embed_tokens = nn.Embedding(vocab, hidden, dtype=dtype, device="meta")

    def forward(
        self, input_ids: Tensor, visual: Tensor, text_positions: Tensor, visual_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Router`, with text ids int64 [T] and visual rows in the checkpoint's precision."""
        text = self.embed_tokens(input_ids).float()
        return self.router(text, visual.float(), text_positions, visual_positions)


def parameter_shapes(spec: RouterSpec, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The router's parameters and their shapes, for a model of width `hidden` with `layers` layers."""
    with torch.device("meta"):
        router = Router(spec, hidden, layers)
    return {name: tuple(parameter.shape) for name, parameter in router.named_parameters()}


@torch.no_grad()
def draw_parameters(router: Router, seed: int) -> None:
    """Random start. Heads begin at zero: before training every token and layer has even odds."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in router.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif "head" in name:
            parameter.zero_()
        else:
            fan_in = 1 if name == "layer_tokens" else parameter.shape[1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm of [rows, W]."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS) * weight


def _rotate(x_HSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated; cos and sin [S, C/2]."""
    first, second = x_HSC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
