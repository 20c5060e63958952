"""A small tokenizer with a published one's ids: single characters or bytes, special tokens, filler words."""

from __future__ import annotations

from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools.random_checkpoint.description import TokenizerDescription

SPACE = "\u2581"  # sentencepiece's
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer(description: TokenizerDescription) -> Any:
    """transformers' tokenizer, to be saved.

    Raises:
        UserError: the largest special id leaves no room for the single characters.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = (_sentencepiece if description.kind == "sentencepiece" else _byte_level)(description)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in description.special]
    )
    if description.bos_first and description.bos:
        bos = description.bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, description.special[bos])],
        )
    roles = {"bos": description.bos, "eos": description.eos, "pad": description.pad, "unk": description.unk}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(description.attributes),
        **{f"{role}_token": token for role, token in roles.items() if token},
    )


def _sentencepiece(description: TokenizerDescription):
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = [SPACE, *(chr(code) for code in range(0x21, 0x7F))]
    vocabulary = _vocabulary(description, [*BYTES, *characters], SPACE)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token=description.unk, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _byte_level(description: TokenizerDescription):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(_vocabulary(description, alphabet, "\u0120"), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _vocabulary(description: TokenizerDescription, pieces: list[str], space: str) -> dict[str, int]:
    """Every id up to the largest special one: special tokens, then the pieces, then ` w<id>`."""
    taken = {number: token for token, number in description.special.items()}
    free = [number for number in range(max(taken) + 1) if number not in taken]
    if len(free) < len(pieces):
        raise UserError(
            f"tokenizer.special: {len(free)} ids are left for {len(pieces)} characters; "
            f"give special tokens ids from {len(pieces)}"
        )
    words = [*pieces, *(f"{space}w{number}" for number in free[len(pieces) :])]
    return dict(sorted({**description.special, **dict(zip(words, free, strict=True))}.items(), key=_id))


def _id(item: tuple[str, int]) -> int:
    return item[1]
