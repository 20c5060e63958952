"""From text and images to the rows of a prompt: the frozen chat template, tokenization, positions.

Positions count the full, unpruned sequence, in which every image token stands for N visual rows. The decoder
graph gets text and visual rows apart, each with its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trimvlm.bundle import PromptTemplate, TextProcessing
from trimvlm.errors import UserError
from trimvlm.value import Value

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Turn(Value, frozen=True, kw_only=True):
    """What the user said, with `images` pictures before it, and the answer where there is one."""

    text: str
    images: int = 0
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.images < 0:
            raise UserError(f"turn.images: {self.images} is not a number of images")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as rows.

    Attributes:
        input_ids: int64 [T], image tokens taken out.
        text_positions: int64 [T], ascending.
        visual_positions: int64 [m * N] for m images, ascending.
    """

    input_ids: NDArray[np.int64]
    text_positions: NDArray[np.int64]
    visual_positions: NDArray[np.int64]

    @property
    def length(self) -> int:
        """Rows of the full, unpruned sequence; the position of the first generated token."""
        return len(self.text_positions) + len(self.visual_positions)


def render(template: PromptTemplate, turns: Sequence[Turn]) -> str:
    """The text of a conversation that the model is to go on with; each image is its one token in it."""
    pieces = [template.start]
    for turn in turns:
        pieces += [template.user_start, template.image * turn.images]
        pieces += [template.text_start, turn.text, template.user_end]
        if turn.answer is not None:
            pieces += [template.answer_start, turn.answer, template.answer_end]
    return "".join([*pieces, template.generate])


def place(ids_S: ArrayLike, image_token_id: int, rows: int) -> Prompt:
    """Takes the image tokens out and gives every row its position.

    Args:
        ids_S: token ids with one image token per image.
        rows: visual rows per image, N.
    """
    ids_S = np.asarray(ids_S, np.int64)
    is_image_S = ids_S == image_token_id
    width_S = np.where(is_image_S, rows, 1)
    first_S = np.cumsum(width_S) - width_S
    return Prompt(
        input_ids=ids_S[~is_image_S],
        text_positions=first_S[~is_image_S],
        visual_positions=(first_S[is_image_S][:, None] + np.arange(rows)).reshape(-1),
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`; truncation and padding that it may ask for are for training and go.

    Raises:
        UserError: not a tokenizer that this version of `tokenizers` understands.
    """
    from tokenizers import Tokenizer, __version__

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 the bindings raise bare Exception
        raise UserError(
            f"{path}: tokenizers {__version__} cannot read it ({error}); export again, or update tokenizers"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a whole prompt, with the special tokens that the tokenizer adds (`<s>`), never twice.

    As transformers' `apply_chat_template`: a text that begins with them already gets none.
    """
    added = "".join(tokenizer.encode("").tokens)
    return tokenizer.encode(text, add_special_tokens=not (added and text.startswith(added))).ids


def make_prompter(tokenizer: Tokenizer, processing: TextProcessing, rows: int) -> Callable[..., Prompt]:
    """Resolves tokenizer, template and visual rows per image into a function.

    Returns:
        `prompter(text, images=0, *, raw=False, history=())`, see `Session.prompt`.
    """
    token = processing.image_token

    def prompter(text: str, images: int = 0, *, raw: bool = False, history: Sequence[Turn] = ()) -> Prompt:
        if raw and history:
            raise UserError("history: a raw prompt is the whole text already; leave history out, or raw")
        turns = [] if raw else _conversation(text, images, history, token)
        whole = text if raw else render(processing.template, turns)
        ids = encode(tokenizer, whole)
        found = ids.count(processing.image_token_id)
        if found != images:
            raise UserError(
                f"the prompt has {found} image token{'s'[: found != 1]} {token} for {images} "
                f"image{'s'[: images != 1]}; give one image for each, in order"
            )
        if not ids or ids[-1] == processing.image_token_id:
            raise UserError("the prompt does not end in text; add the question after the last image")
        return place(ids, processing.image_token_id, rows)

    return prompter


def _conversation(text: str, images: int, history: Sequence[Turn], token: str) -> list[Turn]:
    """All turns; the images that the history does not use come with the last one.

    Raises:
        UserError: an image token inside the texts, an unanswered turn in the history, or too few images.
    """
    before = sum(turn.images for turn in history)
    if before > images:
        raise UserError(f"the history has {before} images, but {images} are given; give them all, in order")
    turns = [*history, Turn(text=text, images=images - before)]
    for number, turn in enumerate(turns):
        if token in turn.text or token in (turn.answer or ""):
            raise UserError(
                f"the text holds the image token {token} itself; leave it out, the chat template places the "
                "images, or pass raw=True with a prompt that is written out in full"
            )
        if turn.answer is None and number < len(history):
            raise UserError(f"history: turn {number} has no answer")
    return turns
