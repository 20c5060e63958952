"""Shape ranges: the smallest, typical and largest shape of each graph input that a plan is built for.

TensorRT calls a set of them an optimisation profile; here a Profile is a pruning profile. A joint set covers
prefill and decode; a split one has a set for each, for which TensorRT-RTX stores the weights twice.

m images, N visual rows of one image, T text rows, P past rows, G key/value heads, C head size, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimvlm.errors import UserError
from trimvlm.filling import INPUTS, filled_name
from trimvlm.profile import ModelSpec
from trimvlm.rules import RouterScores
from trimvlm.schedule import Schedule
from trimvlm.target import Limits
from trimvlm.value import Value

TYPICAL_TEXT = 32  # rows of a question with its template


class ShapeRange(Value, frozen=True, kw_only=True):
    """Shapes of one input: every dimension lies within `min` and `max`; kernels are chosen for `opt`."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise UserError(
                f"shape range {self.min}..{self.opt}..{self.max}: different numbers of dimensions"
            )
        if not all(a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise UserError(f"shape range {self.min}..{self.opt}..{self.max}: not ascending")

    def plain(self) -> list[list[int]]:
        """`[min, opt, max]` as JSON holds it."""
        return [list(self.min), list(self.opt), list(self.max)]


def decoder_ranges(schedule: Schedule, limits: Limits, *, filled: bool = False) -> dict[str, ShapeRange]:
    """One joint range per decoder input, prefill and decode together; typical is a prefill with one image.

    Args:
        filled: of the graph without empty tensors (`trimvlm.filling`).

    Raises:
        UserError: a selection or skip stage over `limits.images` images exceeds TensorRT's TopK.
    """
    model, images = schedule.model, limits.images
    text = _rows((1,), (min(TYPICAL_TEXT, limits.text),), (limits.text,))
    visual = _rows((0,), (schedule.visual_tokens,), (images * schedule.visual_tokens,))
    ranges = {
        "input_ids": text,
        "visual": _rows(*((*shape, model.hidden) for shape in (visual.min, visual.opt, visual.max))),
        "text_positions": text,
        "visual_positions": visual,
    }
    if model.mrope:
        for kind, rows in (("text", text), ("visual", visual)):
            ranges[f"{kind}_coordinates"] = _rows(*((3, *size) for size in (rows.min, rows.opt, rows.max)))
    for stage, row in enumerate(schedule.stages):
        assert row.select
        keep = images * row.select.keep
        if keep + filled > limits.topk:
            raise UserError(
                f"layer {row.layer}: select.keep: {images} images keep {keep} tokens, but TensorRT's TopK "
                f"takes at most {limits.topk}; lower limits.images of the target"
            )
        ranges[f"forced.{stage}"] = _rows((0,), (0,), (keep,))
        if isinstance(row.select.by, RouterScores):
            ranges["router_scores"] = visual
    for stage, row in enumerate(schedule.skip_stages):
        # The graph finds the rows in skip mode by a TopK, and those that are not by another.
        if images * max(row.skipped, row.live - row.skipped) + filled > limits.topk:
            raise UserError(
                f"layer {row.layer}: skip.stages: of {images} images {images * row.skipped} tokens skip and "
                f"{images * (row.live - row.skipped)} do not, but TensorRT's TopK takes at most "
                f"{limits.topk}; lower limits.images of the target"
            )
        ranges[f"forced_skip.{stage}"] = _rows((0,), (0,), (images * row.skipped,))
    for row in schedule.rows:
        if not row.attends:
            continue
        past = images * row.cached + limits.text + limits.new_tokens
        if row.cached and row.masked_by is not None:
            ranges[f"past_visible.{row.masked_by}"] = _rows((0,), (0,), (past,))
        for half in ("key", "value"):
            ranges[f"past_{half}.{row.layer}"] = _rows(
                *((1, model.kv_heads, rows, model.head_dim) for rows in (0, 0, past))
            )
    return _filled(ranges) if filled else ranges


def _filled(ranges: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
    """One row more where a filled graph has its filler row."""
    found = {}
    for name, shapes in ranges.items():
        port = filled_name(name)
        axis = INPUTS.get(port.partition(".")[0])
        found[port] = ShapeRange(
            **{
                end: tuple(size + (n == axis) for n, size in enumerate(getattr(shapes, end)))
                for end in ("min", "opt", "max")
            }
        )
    return found


def split(ranges: Mapping[str, ShapeRange]) -> tuple[dict[str, ShapeRange], dict[str, ShapeRange]]:
    """Joint ranges of a decoder as two: of prefill, which has no past, and of decode, which has one text row.

    Decode has the fewest visual rows that the joint ranges allow, and no forced indices.
    """
    prefill, decode = dict(ranges), dict(ranges)
    for name, joint in ranges.items():
        if name.startswith("past_"):
            prefill[name] = ShapeRange(min=joint.min, opt=joint.min, max=joint.min)
            decode[name] = ShapeRange(min=joint.min, opt=joint.max, max=joint.max)
        else:  # one text row, no (or one) visual row
            decode[name] = ShapeRange(min=joint.min, opt=joint.min, max=joint.min)
    return prefill, decode


def images_range(shape: tuple[int, ...], limits: Limits, *, one: bool) -> ShapeRange:
    """Range of the vision graph's `pixel_values`.

    Args:
        shape: for one image.
        one: the graph takes one image at a time.
    """
    return _rows(shape, shape, shape if one else (limits.images, *shape[1:]))


def features_range(rows: int, width: int, limits: Limits) -> ShapeRange:
    """Range of the projector graph's `features` [rows, width]; `rows` of one image are typical."""
    return _rows((1, width), (rows, width), (limits.images * rows, width))


def router_ranges(model: ModelSpec, limits: Limits) -> dict[str, ShapeRange]:
    """Ranges of the router graph's inputs; it always has a visual row (`trimvlm.routing`). Typical is one
    image, as many rows as without an encoder stage."""
    text = _rows((1,), (min(TYPICAL_TEXT, limits.text),), (limits.text,))
    visual = _rows((1,), (model.visual_tokens,), (limits.images * model.visual_tokens,))
    return {
        "input_ids": text,
        "visual": _rows(*((*shape, model.hidden) for shape in (visual.min, visual.opt, visual.max))),
        "text_positions": text,
        "visual_positions": visual,
    }


def plain(ranges: Mapping[str, ShapeRange]) -> dict[str, list[list[int]]]:
    """Ranges as a manifest holds them."""
    return {name: shape.plain() for name, shape in ranges.items()}


def _rows(low: tuple[int, ...], typical: tuple[int, ...], high: tuple[int, ...]) -> ShapeRange:
    return ShapeRange(min=low, opt=typical, max=high)
