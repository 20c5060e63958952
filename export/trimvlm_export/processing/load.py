"""A checkpoint's configuration and processor as transformers loads them; nothing is fetched or executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_export import families


def load(kind: str, checkpoint: Path | str, **options: Any) -> Any:
    """`kind`.from_pretrained(checkpoint) of transformers, local files only.

    Raises:
        UserError: transformers cannot.
    """
    import transformers

    function: Callable[..., Any] = getattr(transformers, kind).from_pretrained
    try:
        return function(str(checkpoint), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint}: transformers cannot load its {kind} ({reason})") from None


def load_config(checkpoint: Path | str) -> Any:
    """transformers' configuration, also of families that it learns about only here.

    Raises:
        UserError: no configuration, or of a kind that transformers does not know.
    """
    path = Path(checkpoint) / "config.json"
    try:
        kind = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    except ValueError:
        kind = None
    if kind in families.names():
        families.of(kind)
    return load("AutoConfig", checkpoint)


def load_processor(checkpoint: Path | str) -> Any:
    """transformers' processor of images and text, with its image processor on Pillow.

    Where a family's processor also takes videos, for which transformers wants torchvision, and there is none,
    this one does without videos.

    Raises:
        UserError: transformers cannot load one, or it is one for text alone.
    """
    config = load_config(checkpoint)
    try:
        processor = load("AutoProcessor", checkpoint)
    except UserError:
        processor = _without_videos(checkpoint, config)
        if processor is None:
            raise
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise UserError(
            f"{checkpoint}: no image processor here; add the checkpoint's preprocessor_config.json"
        )
    if getattr(images, "backend", "pil") != "pil":
        processor.image_processor = load("AutoImageProcessor", checkpoint, backend="pil")
    return processor


def _without_videos(checkpoint: Path | str, config: Any) -> Any:
    """The processor of the model's family with no video processor, or None where it never has one."""
    from transformers import PROCESSOR_MAPPING

    family: Any = PROCESSOR_MAPPING.get(type(config), None)
    if family is None or "video_processor" not in family.get_attributes():
        return None

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else family.check_argument_for_proper_class(self, name, argument)

    cls = type(family.__name__, (family,), {"check_argument_for_proper_class": check})
    parts = {
        "image_processor": lambda: load("AutoImageProcessor", checkpoint, backend="pil"),
        "tokenizer": lambda: load("AutoTokenizer", checkpoint),
        "video_processor": lambda: None,
    }
    arguments = [parts[name]() for name in family.get_attributes()]
    options, _ = family.get_processor_dict(str(checkpoint), local_files_only=True)
    return cls.from_args_and_dict(arguments, options)
