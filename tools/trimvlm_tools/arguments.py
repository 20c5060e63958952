"""Arguments that several verbs take."""

from __future__ import annotations

import argparse
import re

from trimvlm.errors import UserError

MODEL = "a Hugging Face checkpoint: its directory, or its Hub id where it is in the local cache"


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """`--image-size WxH`: which grid of visual tokens a model with several is wanted for."""
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="WxH",
        help="size of the images in pixels, for models whose visual tokens depend on it; images of other "
        "sizes are made to fit",
    )


def target_name(text: str) -> str:
    """The name under which a bundle has a target's engines; of a file of one's own, what it says."""
    if not text.endswith((".yaml", ".yml")):
        return text
    from trimvlm_engines import targets

    try:
        return targets.load(text).name
    except UserError as error:  # argparse would say nothing but that it is invalid
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, as in 640x480")
    return int(found[1]), int(found[2])
