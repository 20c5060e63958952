"""A checkpoint's model and processor as transformers has them, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm.image_processing import SingleView
from trimvlm.images import fit, profile_grid, read_rgb
from trimvlm.profile import Grid
from trimvlm_export import families
from trimvlm_export.checkpoint import load_config
from trimvlm_export.processing import image_processing, load_processor


class Preparation:
    """From a question about images to the inputs of the model.

    Args:
        checkpoint: its directory.
        grid: that every image is made to fit, as the runtime does where a bundle has no other.

    Raises:
        UserError: no model there, or images that trimvlm cannot prepare.
    """

    def __init__(self, checkpoint: Path, grid: Grid | None) -> None:
        self.processor = load_processor(checkpoint)
        self.grid = grid
        self._processing = image_processing(checkpoint)

    def __call__(self, images: Sequence[Path | str], prompt: str) -> dict[str, Any]:
        """What the model is given: `prompt` is the whole text, as the chat template makes it.

        Raises:
            UserError: an image that cannot be read.
        """
        pictures = [read_rgb(image) for image in images]
        if self.grid is not None:
            pictures = [fit(self._processing, image, self.grid) for image in pictures]
        return dict(self.processor(images=pictures or None, text=prompt, return_tensors="pt"))


def grid_of(checkpoint: Path, image_size: tuple[int, int] | None) -> Grid | None:
    """The grid of images of a size (width, height) in pixels; None where images have none.

    Raises:
        UserError: no model there, images that trimvlm cannot prepare, or a size that comes to no grid.
    """
    load_config(checkpoint)  # says better than the processor that there is no model
    processing = image_processing(checkpoint)
    if image_size is None:
        return None
    grid = profile_grid(processing, *image_size)
    if grid is None:
        size = "{}x{}".format(*image_size)
        fixed = "every image is one view of a fixed size in this model; leave it out"
        narrow = f"images of {size} pixels come to no grid of this model; take a size that is less narrow"
        raise UserError(f"--image-size: {fixed if isinstance(processing, SingleView) else narrow}")
    return grid


def load_model(checkpoint: Path) -> Any:
    """transformers' model, or that of a family which it does not have, in float32 and evaluation mode."""
    from transformers import AutoModelForImageTextToText

    families.of(load_config(checkpoint).model_type)  # one that transformers lacks registers itself
    load = AutoModelForImageTextToText.from_pretrained
    return load(checkpoint, dtype="float32", local_files_only=True).eval()
