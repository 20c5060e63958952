"""How a checkpoint's images are prepared: the options, frozen at export. What they do is `trimvlm.images`."""

from __future__ import annotations

from typing import TypeAlias

from trimvlm.value import Value


class SingleView(Value, frozen=True, kw_only=True, tag_field="kind", tag="single_view"):
    """One view of a fixed size (LLaVA-1.5, MobileVLM). Steps run in this order.

    Attributes:
        resize: shortest edge in pixels (int), exact (height, width), or None.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        crop: centre crop (height, width), or None.
        rescale: factor on 0..255 values.
        mean, std: per channel, after rescaling.
    """

    resize: int | tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ImageProcessing: TypeAlias = SingleView
