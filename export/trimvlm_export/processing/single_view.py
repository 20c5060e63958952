"""One view of a fixed size: the processors of CLIP, SigLIP and LLaVA-1.5."""

from __future__ import annotations

from typing import Any

from trimvlm.image_processing import SingleView
from trimvlm_export.processing.source import Source

PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
OPTIONS: dict[str, Any] = {}


def freeze(source: Source) -> SingleView:
    """The options.

    Raises:
        UserError: padding that is not to a square first, a size rule that trimvlm does not know, or a size
            that the tower does not take.
    """
    images, pads = source.images, bool(getattr(source.images, "do_pad", None))
    if pads and not source.name.startswith("Llava"):
        raise source.error("do_pad is not supported, only resize and crop")
    crop = images.crop_size if getattr(images, "do_center_crop", None) else None
    frozen = SingleView(
        square=pads,
        resize=_resize(source) if images.do_resize else None,
        crop=(crop["height"], crop["width"]) if crop else None,
        **source.levels(),
    )
    size = frozen.crop or frozen.resize
    if not isinstance(size, tuple):
        raise source.error("makes images of several sizes; it needs a centre crop or an exact size")
    tower = source.vision.image_size
    if size != (tower, tower):
        raise source.error(
            f"makes {size[0]} x {size[1]} pixels, but the vision tower takes {tower} x {tower}; correct the "
            "one or the other"
        )
    return frozen


def _resize(source: Source) -> int | tuple[int, int]:
    size = source.images.size
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return size["shortest_edge"]
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise source.error(f"size {dict(size)} is not supported, only shortest_edge, or height and width")
