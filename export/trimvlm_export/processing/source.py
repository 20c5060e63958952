"""What a checkpoint's image processing is frozen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimvlm.errors import UserError


@dataclass(frozen=True)
class Source:
    """A checkpoint's image processor and what it must fit.

    Attributes:
        checkpoint: what errors name.
        images: transformers' image processor.
        whole: transformers' processor of images and text.
        config: the whole model's configuration.
    """

    checkpoint: str
    images: Any
    whole: Any
    config: Any

    @property
    def name(self) -> str:
        """The image processor's class."""
        return type(self.images).__name__

    @property
    def vision(self) -> Any:
        """Configuration of the tower."""
        return self.config.vision_config

    def levels(self) -> dict[str, Any]:
        """The options `resample`, `rescale`, `mean` and `std`, which all kinds have."""
        images = self.images
        return {
            "resample": int(images.resample),
            "rescale": images.rescale_factor if images.do_rescale else 1.0,
            "mean": _triple(images.image_mean) if images.do_normalize else (0.0, 0.0, 0.0),
            "std": _triple(images.image_std) if images.do_normalize else (1.0, 1.0, 1.0),
        }

    def side(self, what: Any) -> int:
        """Pixels at the side of a square that `size` or `crop_size` names.

        Raises:
            UserError: it names anything else.
        """
        if what.get("shortest_edge") and not what.get("longest_edge"):
            return what["shortest_edge"]
        if what.get("height") and what.get("height") == what.get("width"):
            return what["height"]
        raise self.error(f"size {dict(what)} is not supported, only squares here")

    def same(self, name: str, processor: Any, model: Any) -> None:
        """Refuses a value that the image processor and the model do not agree on.

        Raises:
            UserError: naming both values.
        """
        if processor != model:
            raise self.error(f"has {name} {processor}, but config.json {model}; correct the one or the other")

    def error(self, what: str) -> UserError:
        """An error about this image processor."""
        return UserError(f"{self.checkpoint}: image processor {self.name} {what}")


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, list | tuple) else (values,) * 3
    return float(red), float(green), float(blue)
