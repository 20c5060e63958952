"""What a processor makes of the image token in a text: as many as the image has, and marks around them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from PIL import Image

from trimvlm.errors import UserError

PICTURE = (64, 64)  # all texts are tried with pictures of one size, so that each has as many tokens


class ImageText:
    """See the module's text.

    Args:
        processor: transformers' processor.
        token: the image token, `token_id` its id.
        source: what errors name.

    Attributes:
        written: what stands in a text for an image, the token once: `<img><IMG_CONTEXT></img>` for InternVL,
            for others the token alone.

    Raises:
        UserError: the processor fails on a text and pictures.
    """

    def __init__(self, processor: Any, token: str, token_id: int, *, source: str) -> None:
        self.processor, self.token, self._id, self._source = processor, token, token_id, source
        ids = self._expanded(token, 1, special=False)
        self._rows = max(1, ids.count(token_id))
        ids = self._collapsed(ids)
        alone = processor.tokenizer(token, add_special_tokens=False).input_ids
        pieces = processor.tokenizer.convert_ids_to_tokens(ids)
        self.written = token if ids == alone else "".join(pieces)

    def ids(self, text: str, images: int, *, special: bool) -> list[int]:
        """Ids of a whole prompt, one image token for each image.

        Args:
            text: rendered by the processor's chat template.
            special: whether the tokenizer adds its special tokens.
        """
        return self._collapsed(self._expanded(text, images, special=special))

    def _expanded(self, text: str, images: int, *, special: bool) -> list[int]:
        pictures = [Image.new("RGB", PICTURE)] * images
        try:
            found = self.processor(text=[text], images=pictures or None, add_special_tokens=special)
        except Exception as error:  # noqa: BLE001 processors raise what they like
            raise UserError(
                f"{self._source}: transformers' {type(self.processor).__name__} fails on a text with images "
                f"({' '.join(str(error).split())[:200]}); correct processor_config.json"
            ) from None
        return list(found["input_ids"][0])

    def _collapsed(self, ids: list[int]) -> list[int]:
        """Images beside one another make one run of image tokens."""
        kept: list[int] = []
        for each, run in groupby(ids):
            length = len(list(run))
            kept += [each] * (length // self._rows if each == self._id else length)
        return kept
