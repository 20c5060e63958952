"""Small tokenizers of the kinds that checkpoints come with, made on the spot.

`from small_tokenizers import KINDS`: name to a function that makes one, with `<image>` as a special token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

CORPUS = [
    "USER: <image>\nWhat is in the picture? ASSISTANT: a small red circle",
    "the quick brown fox jumps over the lazy dog, 0123456789 times.",
    "Größe, façade, naïve, 猫が好き, привет мир, 😀😃 emoji",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]


def _special(tokenizer: Tokenizer, *, bos: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2, Qwen, Llama-3: pieces are bytes, no `<s>`; most characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    return _special(tokenizer, bos=False)


def sentencepiece() -> Tokenizer:
    """Llama-2, LLaVA-1.5: spaces become U+2581, unknown characters byte tokens, `<s>` comes first."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzABEINRSTUW:?,.ö"]
    merges = [("\u2581", "a"), ("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("r", "e"), ("re", "d")]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _special(tokenizer, bos=True)


def metaspace() -> Tokenizer:
    """T5-like unigram pieces with a metaspace decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _special(tokenizer, bos=True)


def word_piece() -> Tokenizer:
    """BERT-like: continuations marked with ##, the decoder tidies punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _special(tokenizer, bos=True)


def word_level() -> Tokenizer:
    """The demo model's: whole words, no decoder."""
    words = [*SPECIAL, "USER:", "ASSISTANT:", "What", "is", "the", "a", "red", "circle", "?", "\u00e9"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _special(tokenizer, bos=True)


KINDS = {maker.__name__: maker for maker in (byte_level, sentencepiece, metaspace, word_piece, word_level)}
