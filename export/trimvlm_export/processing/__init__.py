"""Freezes how a checkpoint's images and text are prepared, so that the device needs no transformers.

Nothing is taken on trust: the frozen image processing and chat template are compared with transformers' own
on examples, and a checkpoint whose processing cannot be frozen is refused.
"""

from __future__ import annotations

from trimvlm_export.processing.images import image_processing
from trimvlm_export.processing.load import load_processor
from trimvlm_export.processing.text import TOKENIZER, text_processing, tokenizer_json

__all__ = ["TOKENIZER", "image_processing", "load_processor", "text_processing", "tokenizer_json"]
