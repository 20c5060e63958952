"""The vision transformer of Qwen2-VL and Qwen2.5-VL for one grid, and its merger, from transformers' modules.

The patches of a visual token lie next to one another, so a token is four rows of the tower (2 x 2 patches);
taps are the mean over them.

Shapes: S patches, N visual tokens (4 N = S), E tower width, D model width, H tower heads, C size of a head,
W windows of P patches each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm.encoder_rules import VisionTaps
from trimvlm.profile import Grid

TOWER = "model.visual."

# A table of at least this many positions is larger than what the exporter computes beforehand; otherwise it
# would write cosines of every single patch into the graph.
POSITIONS = 256


class GridVision(nn.Module):
    """A vision transformer for one grid, without weights: transformers' own modules around attention.

    transformers computes attention window by window, which would be thousands of nodes; here windows of equal
    size are one batch. Only order, not content, depends on it: tokens are put into the order of their windows
    once, and back at the end.

    Args:
        tower: transformers' module.
        config: transformers' configuration of the whole model.
        grid: rows and columns of visual tokens.
        taps: None: with the merger, what the decoder reads. Otherwise without it: the tower's rows and what
            the taps ask for.
        order: the visual tokens in the order in which they are computed, int64 [N]; None: row by row.
        windows: (number, patches) of equal windows, in that order; None: all patches see one another.
        full: layers in which all patches see one another in any case.
    """

    def __init__(
        self,
        tower: Any,
        config: Any,
        grid: Grid,
        taps: VisionTaps | None,
        *,
        order: Tensor | None = None,
        windows: list[tuple[int, int]] | None = None,
        full: tuple[int, ...] = (),
    ) -> None:
        from transformers.vision_utils import get_vision_position_ids

        super().__init__()
        self.taps = taps or VisionTaps()
        self.side = config.vision_config.spatial_merge_size
        self.patch_embed, self.blocks = tower.patch_embed, tower.blocks
        self.merger = tower.merger if taps is None else None
        everything = [(1, grid[0] * grid[1] * self.side**2)]
        self.windows = [
            everything if windows is None or layer in full else windows for layer in range(len(self.blocks))
        ]
        positions = get_vision_position_ids(
            torch.tensor([[1, grid[0] * self.side, grid[1] * self.side]]), self.side
        )
        self.order = None if order is None else nn.Buffer(order)
        self.back = None if order is None else nn.Buffer(order.argsort())
        self.positions = nn.Buffer(self._reordered(positions, order).flatten())
        self.angles = nn.Buffer(_angles(tower, config, int(positions.max()) + 1))

    def parameter_names(self) -> dict[str, str]:
        """From this module's parameter names to transformers' names in the whole model."""
        return {name: TOWER + name for name, _ in self.named_parameters()}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [S, 3 * 2 * 14 * 14] -> visual [N, D]; or tower [1, N, 4 E] and the taps in order."""
        # The convolution's kernel covers a whole patch, so it is a matrix product.
        hidden = F.linear(pixel_values, self.patch_embed.proj.weight.flatten(1))
        hidden = self._reordered(hidden, self.order)
        rotary = self._rotary()
        states, found = [hidden], {}
        for layer, block in enumerate(self.blocks):
            projected = block.attn.qkv(block.norm1(hidden)).unflatten(1, (3, block.attn.num_heads, -1))
            turning, value = projected.split((2, 1), dim=1)
            query, key = _turned(turning, *rotary).unbind(1)
            value = value.squeeze(1)
            if layer in self.taps.received_attention:
                received = _received(query, key, self.windows[layer]).unflatten(0, (-1, self.side**2))
                found[f"received_attention.{layer}"] = self._restored(received.mean(1))[None]
            hidden = hidden + block.attn.proj(_attend(query, key, value, self.windows[layer]))
            hidden = hidden + block.mlp(block.norm2(hidden))
            states.append(hidden)
        if self.merger is not None:
            return (self._restored(self.merger(hidden)),)
        for number in self.taps.features:
            found[f"features.{number}"] = self._restored(self._tokens(states[number]).mean(1))[None]
        rows = self._restored(self._tokens(hidden).flatten(1))[None]
        return (rows, *(found[name] for name in self.taps.names))

    def _tokens(self, rows_SE: Tensor) -> Tensor:
        """[S, E] -> [N, 4, E]."""
        return rows_SE.unflatten(0, (-1, self.side**2))

    def _reordered(self, rows_SE: Tensor, order_N: Tensor | None) -> Tensor:
        return rows_SE if order_N is None else self._tokens(rows_SE).index_select(0, order_N).flatten(0, 1)

    def _restored(self, tokens_NE: Tensor) -> Tensor:
        return tokens_NE if self.back is None else tokens_NE.index_select(0, self.back)

    def _rotary(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine float32 [S, 1, 1, C / 2]: of each patch's row, then of its column."""
        tables = self.angles.index_select(0, self.positions).unflatten(0, (-1, 2))
        cos, sin = tables.unbind(2)
        return cos.flatten(1)[:, None, None], sin.flatten(1)[:, None, None]


class TokenMerger(nn.Module):
    """transformers' merger, without weights: features [rows, 4 E] -> visual [rows, D]."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.merger = tower.merger

    def parameter_names(self) -> dict[str, str]:
        """As `GridVision.parameter_names`."""
        return {name: TOWER + name for name, _ in self.named_parameters()}

    def forward(self, features: Tensor) -> Tensor:
        """[rows, 4 E] -> [rows, D]: the norm is over each of the four patches."""
        width = self.merger.ln_q.weight.shape[0]
        return self.merger(features.unflatten(-1, (-1, width)))


def _angles(tower: Any, config: Any, positions: int) -> Tensor:
    """Cosine and sine float32 [positions, 2, C / 4] of one coordinate."""
    numbers = torch.arange(max(positions, POSITIONS))
    rotary = type(tower.rotary_pos_emb)(config.vision_config)
    tables = rotary(torch.empty(0), torch.stack([numbers, numbers], dim=1))
    return torch.stack([table[:, : table.shape[1] // 4] for table in tables], dim=1)


def _turned(pairs_S2HC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys at their rotary positions, in float32. transformers' own function would widen the
    tables anew in every layer."""
    first, second = pairs_S2HC.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(pairs_S2HC.dtype)


def _batches(rows_SHC: Tensor, windows: list[tuple[int, int]]) -> list[Tensor]:
    """[W, H, P, C] for each size of windows."""
    parts = rows_SHC.split([number * size for number, size in windows])
    return [part.unflatten(0, sizes).transpose(1, 2) for part, sizes in zip(parts, windows, strict=True)]


def _attend(query: Tensor, key: Tensor, value: Tensor, windows: list[tuple[int, int]]) -> Tensor:
    """Attention within each window, [S, E]."""
    batches = zip(*(_batches(rows, windows) for rows in (query, key, value)), strict=True)
    parts = [F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1) for batch in batches]
    return torch.cat(parts).flatten(1)


def _received(query: Tensor, key: Tensor, windows: list[tuple[int, int]]) -> Tensor:
    """Attention that each patch receives, float32 [S], mean over the heads and over all S rows: rows of other
    windows give none, so that windows of different sizes compare."""
    parts = []
    for query_WHPC, key_WHPC in zip(_batches(query, windows), _batches(key, windows), strict=True):
        scores = query_WHPC.float() @ key_WHPC.float().transpose(2, 3) * query.shape[-1] ** -0.5
        parts.append(torch.softmax(scores, dim=-1).sum(2).mean(1).flatten())
    return torch.cat(parts) / query.shape[0]
