"""Text from token ids as they come: pieces that later tokens cannot change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # sentencepiece's byte fallback, one byte per token
UNFINISHED = "\ufffd"


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Decodes ids one by one and yields the text that has become final; never an empty piece.

    Joined, the pieces are what decoding all ids at once gives. Two things can still change and are held back:
    a character of which not all bytes are there (byte-level tokenizers show it as U+FFFD), and a run of
    byte-fallback tokens, which is decoded as a whole: one bad byte turns all of it into U+FFFD.

    The whole answer is decoded each time, because decoders treat the first token of a text differently
    (leading space). Special tokens give no text.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    seen: list[int] = []
    sent = 0
    for token_id in ids:
        if token_id in special:
            continue
        seen.append(token_id)
        if BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token_id) or ""):
            continue
        text = tokenizer.decode(seen).rstrip(UNFINISHED)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    if rest := tokenizer.decode(seen)[sent:]:
        yield rest
