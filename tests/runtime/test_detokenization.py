"""Streaming: joined pieces are the whole text, and no piece is taken back."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS
from tokenizers import Tokenizer

from trimvlm.detokenization import stream_text


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_ids(kind: str, data):
    """Whatever a model says: pieces join to what decoding at once gives, none of them empty."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(pieces)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab the red\n.ö猫😀é\u0301\U0001f468\u200d"), max_size=20))
def test_text_comes_back_without_broken_characters(kind: str, text: str):
    tokenizer = tokenizer_of(kind)
    pieces = list(stream_text(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_come_early(kind: str):
    """At each point all text is out except what may still change."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("What is the red circle ?", add_special_tokens=False).ids
    taken = []

    def feed():
        for token in ids:
            taken.append(token)
            yield token

    got = ""
    for piece in stream_text(tokenizer, feed()):
        got += piece
        assert got == tokenizer.decode(taken)


def test_a_character_of_several_tokens_waits_for_its_last():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a😀b").ids
    assert len(ids) > 4
    assert list(stream_text(tokenizer, ids)) == ["a", "😀", "b"]
    assert list(stream_text(tokenizer, ids[:-2])) == ["a", "\ufffd"]  # cut short: said at the end


def test_a_byte_run_waits_until_it_is_over():
    """`<0x0A>` alone is a line end; before a broken character the whole run becomes U+FFFD."""
    tokenizer = tokenizer_of("sentencepiece")

    def ids(*tokens: str) -> list[int]:
        return [tokenizer.token_to_id(token) for token in tokens]

    assert list(stream_text(tokenizer, ids("a", "<0x0A>", "b"))) == ["a", "\nb"]
    assert list(stream_text(tokenizer, ids("a", "<0x0A>"))) == ["a", "\n"]
    assert list(stream_text(tokenizer, ids("a", "<0x0A>", "<0xF0>", "b"))) == ["a", "\ufffd\ufffdb"]
    cat = ids("<0xE7>", "<0x8C>", "<0xAB>")
    assert list(stream_text(tokenizer, [*cat, *ids("a")])) == ["猫a"]


def test_special_tokens_give_no_text():
    tokenizer = tokenizer_of("word_level")
    assert list(stream_text(tokenizer, [1, 7, 0, 8, 2])) == ["What", " is"]
    assert list(stream_text(tokenizer, [])) == []
