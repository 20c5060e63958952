"""The sampler against an independent computation of the same distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimvlm.errors import UserError
from trimvlm.sampling import make_sampler


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Token to probability, written for reading: sort, add up, stop, renormalise."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    kept, reached = [], 0.0
    for token in sorted(range(len(logits)), key=lambda token: (-probabilities[token], token)):
        if kept and reached >= top_p:
            break
        kept.append(token)
        reached += probabilities[token]
    return {token: probabilities[token] / reached for token in kept}


def test_greedy_takes_the_lowest_id_on_ties():
    greedy = make_sampler()
    assert greedy(np.array([1, 5, 3, 5], np.float32)) == 1
    assert greedy(np.array([1, 5, 3, 5], np.float16)) == 1
    assert greedy(np.array([-np.inf, -3.0])) == 1


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (0.3, 1.0), (1.0, 0.01)]
)
def test_frequencies_are_those_of_the_nucleus(temperature: float, top_p: float):
    logits = [0.1, 2.0, -1.0, 1.5, 2.0, 0.0, -4.0]
    want = nucleus(logits, temperature, top_p)
    draw = make_sampler(temperature, top_p, seed=3)
    counts = np.bincount([draw(np.array(logits, np.float32)) for _ in range(20_000)], minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(want)
    for token, probability in want.items():
        assert abs(counts[token] / 20_000 - probability) < 4.5 * math.sqrt(0.25 / 20_000)


def test_agrees_with_transformers_about_the_nucleus():
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    random = np.random.default_rng(0)
    for _ in range(15):
        logits = random.normal(0, 3, 40).astype(np.float32)
        temperature, top_p = random.uniform(0.3, 2), random.uniform(0.2, 0.99)
        scores = TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), torch.tensor(logits)[None])
        warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), scores)[0]
        drawn = make_sampler(temperature, top_p, seed=1)
        assert {drawn(logits) for _ in range(500)} <= set(torch.isfinite(warped).nonzero()[:, 0].tolist())
        assert set(nucleus(logits.tolist(), temperature, top_p)) == set(
            torch.isfinite(warped).nonzero()[:, 0].tolist()
        )


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    st.floats(0.01, 5),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_draws_stay_in_the_nucleus_and_repeat(logits, temperature, top_p, seed):
    values = np.array(logits, np.float32)
    first, second = make_sampler(temperature, top_p, seed), make_sampler(temperature, top_p, seed)
    tokens = [first(values) for _ in range(5)]
    assert tokens == [second(values) for _ in range(5)]
    # One rounding error of top_p may move the edge of the nucleus by a token.
    assert set(tokens) <= set(nucleus([float(v) for v in values], temperature, min(1, top_p + 1e-9)))


def test_seeds_differ():
    flat = np.zeros(1000, np.float32)
    assert len({make_sampler(1.0, 1.0, seed)(flat) for seed in range(20)}) > 15


def test_a_low_temperature_is_nearly_greedy_and_does_not_overflow():
    assert make_sampler(1e-30)(np.array([-1e30, 3, 3.1, 1e4], np.float32)) == 3


def test_impossible_tokens_are_never_drawn():
    draw = make_sampler(5.0, 1.0, 0)
    assert {draw(np.array([-np.inf, 0, -np.inf, 0])) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [1.0, np.inf], [-np.inf, -np.inf], [np.nan, np.nan]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: list[float], temperature: float):
    with pytest.raises(UserError, match="not finite"):
        make_sampler(temperature)(np.array(bad, np.float32))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_are_checked_when_it_is_made(options: dict, name: str):
    with pytest.raises(UserError, match=f"^{name}: "):
        make_sampler(**options)
