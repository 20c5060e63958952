"""How a checkpoint's images are prepared: the options, frozen at export. What they do is `trimvlm.images`."""

from __future__ import annotations

from typing import TypeAlias

from trimvlm.profile import Grid
from trimvlm.value import Value

Triple: TypeAlias = tuple[float, float, float]


class SingleView(Value, frozen=True, kw_only=True, tag_field="kind", tag="single_view"):
    """One view of a fixed size (LLaVA-1.5, MobileVLM). Steps run in this order.

    Attributes:
        square: pad to a square in the mean colour, the image in the middle.
        resize: shortest edge in pixels (int), exact (height, width), or None.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        crop: centre crop (height, width), or None.
        rescale: factor on 0..255 values.
        mean, std: per channel, after rescaling.
    """

    square: bool = False
    resize: int | tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float
    mean: Triple
    std: Triple


class AnyResolution(Value, frozen=True, kw_only=True, tag_field="kind", tag="any_resolution"):
    """A view of the whole image, and the image on a canvas of tiles (LLaVA-NeXT, LLaVA-OneVision).

    Attributes:
        view: pixels at each side of a view.
        tokens: visual tokens at each side of a view.
        canvases: (height, width) in pixels, multiples of `view`; the image gets the one that wastes least.
        most: how many views' worth of tokens a grid may have before it is thinned out (`anyres_max_9`), or
            None.
        square: an image that gets no tiles is padded to a square in the mean colour instead of stretched.
        resample, rescale, mean, std: as `SingleView`.
    """

    view: int
    tokens: int
    canvases: tuple[Grid, ...]
    most: int | None
    square: bool
    resample: int
    rescale: float
    mean: Triple
    std: Triple


class Tiles(Value, frozen=True, kw_only=True, tag_field="kind", tag="tiles"):
    """The image stretched to the arrangement of tiles nearest to its shape, then a thumbnail (InternVL).

    Attributes:
        view: pixels at each side of a tile and of the thumbnail, which a single tile goes without.
        tokens: visual tokens at each side of a tile.
        least, most: tiles, without the thumbnail.
        resample, rescale, mean, std: as `SingleView`.
    """

    view: int
    tokens: int
    least: int
    most: int
    resample: int
    rescale: float
    mean: Triple
    std: Triple


class Patches(Value, frozen=True, kw_only=True, tag_field="kind", tag="patches"):
    """The image resized to whole visual tokens and cut into patches (Qwen2-VL, Qwen2.5-VL).

    Attributes:
        patch: pixels at each side of a patch.
        merge: patches at each side of a visual token.
        frames: how often each patch is repeated, for towers that see pairs of frames.
        least, most: pixels of the resized image.
        resample, rescale, mean, std: as `SingleView`.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    resample: int
    rescale: float
    mean: Triple
    std: Triple


ImageProcessing: TypeAlias = SingleView | AnyResolution | Tiles | Patches
