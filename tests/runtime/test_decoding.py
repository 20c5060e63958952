"""The token loop with a decoder of ten lines, and no model."""

from __future__ import annotations

import numpy as np

from trimvlm.decoding import generate_ids, prefill_inputs, step_inputs
from trimvlm.sampling import make_sampler
from trimvlm.text import place

V = 10


class CountingDecoder:
    """Says the sum of all ids it has seen, by its own past, plus the position; remembers its inputs."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, inputs: dict) -> dict:
        self.calls.append(inputs)
        past = inputs.get("past_key.3", np.zeros(0, np.int64))
        present = np.concatenate([past, inputs["input_ids"]])
        token = (present.sum() + inputs["text_positions"][-1]) % V
        return {"logits": np.eye(V, dtype=np.float32)[[token]], "present_key.3": present}


PROMPT = place([1, 4, 5], 4, 6)  # one image of 6 rows in the middle
VISUAL = np.zeros((6, 2), np.float32)


def generate(decoder, eos=(), tokens=5) -> list[int]:
    return list(generate_ids(decoder, PROMPT, VISUAL, make_sampler(), eos_ids=eos, max_new_tokens=tokens))


def test_tokens_and_positions():
    decoder = CountingDecoder()
    # By hand: 1+5+7=13, then sums 6+3=9 at position 8, 18 at 9, 25 at 10, 30 at 11.
    assert generate(decoder) == [3, 7, 5, 1, 3]
    assert [call["text_positions"].tolist() for call in decoder.calls] == [[0, 7], [8], [9], [10], [11]]
    assert [call["input_ids"].tolist() for call in decoder.calls] == [[1, 5], [3], [7], [5], [1]]


def test_visual_rows_are_fed_once():
    decoder = CountingDecoder()
    generate(decoder)
    assert decoder.calls[0]["visual"] is VISUAL
    assert decoder.calls[0]["visual_positions"].tolist() == [1, 2, 3, 4, 5, 6]
    assert all("visual" not in call and "visual_positions" not in call for call in decoder.calls[1:])


def test_it_ends_at_any_eos_and_does_not_say_it():
    assert generate(CountingDecoder(), eos=(9, 5)) == [3, 7]
    decoder = CountingDecoder()
    assert generate(decoder, eos=(3,)) == []
    assert len(decoder.calls) == 1


def test_the_decoder_runs_only_as_often_as_needed():
    for tokens in (1, 2, 5):
        decoder = CountingDecoder()
        assert len(generate(decoder, tokens=tokens)) == tokens == len(decoder.calls)


def test_it_is_lazy():
    decoder = CountingDecoder()
    ids = generate_ids(decoder, PROMPT, VISUAL, make_sampler(), eos_ids=(), max_new_tokens=100)
    assert [next(ids), next(ids)] == [3, 7]
    assert len(decoder.calls) == 2


def test_inputs_by_name():
    forced = prefill_inputs(PROMPT, VISUAL, [np.array([0]), np.array([1, 2])])
    assert forced["forced.0"].tolist() == [0] and forced["forced.1"].tolist() == [1, 2]
    step = step_inputs(7, 30, {"logits": 0, "present_key.0": "k", "present_value.11": "v", "scores.0": 1})
    assert step["past_key.0"] == "k" and step["past_value.11"] == "v"
    assert sorted(step) == ["input_ids", "past_key.0", "past_value.11", "text_positions"]
    assert step["input_ids"].dtype == step["text_positions"].dtype == np.int64
