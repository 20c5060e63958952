"""Each rule of the exported decoder against the formula of `trimvlm.rules`, written out in loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from trimvlm.profile import SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, TextAttention, ValueInfluence
from trimvlm.schedule import Row
from trimvlm_export import decoder_scores as ranking
from trimvlm_export.decoder_attention import Attended
from trimvlm_export.decoder_skip import enter, gain
from trimvlm_export.decoder_stream import EveryRow, GatheredRows, Stream, TextRows

H, G, C, D, PAST = 4, 2, 8, 6, 3
# Text before, between and after two images of three rows; rows are kept visual first.
VISUAL, TEXT = [1, 2, 3, 5, 6, 7], [0, 4, 8, 9]
POSITIONS = np.array(VISUAL + TEXT)
V, R = len(VISUAL), len(VISUAL) + len(TEXT)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream_of(visual: int = V, shown: list[bool] | None = None) -> Stream:
    """The first `visual` visual rows and all text rows."""
    places = torch.tensor(VISUAL[:visual] + TEXT)
    return Stream.of(
        drawn(len(places), D),
        places,
        torch.arange(visual),
        shown=None if shown is None else torch.tensor(shown[:visual] + [True] * len(TEXT)),
    )


def of_rows(*index: int) -> Stream:
    """A stream of these rows of the `visual` input alone."""
    rows = torch.tensor(index, dtype=torch.long)
    return Stream.of(drawn(len(index), D), rows, rows)


def attended(past: int = 0, row: Row | None = None, **change: Any) -> Attended:
    """A layer's random queries, keys and values."""
    found = Attended(
        row=row or Row(layer=0, live=V, after=V),
        stream=stream_of(),
        part=EveryRow(),
        queries=drawn(1, H, R, C, seed=1) * 2,
        keys=drawn(1, G, past + R, C, seed=2),
        values=drawn(1, G, past + R, C, seed=3),
        past=past,
        past_visible=None,
    )
    return replace(found, **change)


def naive_weights(at: Attended, sees: np.ndarray) -> np.ndarray:
    """[H, Q, S] of queries that see the keys that are True in [Q, S]; a row that sees none has none."""
    q, k = at.queries[0].double().numpy(), at.keys[0].double().numpy()
    weights = np.zeros((H, q.shape[1], k.shape[1]))
    for h, i in product(range(H), range(q.shape[1])):
        found = {j: np.exp(q[h, i] @ k[h * G // H, j] / np.sqrt(C)) for j in np.flatnonzero(sees[i])}
        for j, value in found.items():
            weights[h, i, j] = value / sum(found.values())
    return weights


def naive_mixed(at: Attended, weights: np.ndarray) -> np.ndarray:
    v = at.values[0].double().numpy()
    return np.stack([weights[h] @ v[h * G // H] for h in range(H)])


def causal(past: int = 0) -> np.ndarray:
    sees = POSITIONS[:, None] >= POSITIONS[None]
    return np.concatenate((np.ones((R, past), bool), sees), axis=1)


def test_last_row_attention() -> None:
    at = attended(past=PAST)
    wanted = naive_weights(at, causal(PAST)).mean(axis=0)[-1, PAST : PAST + V]
    found = ranking.by_previous_layer(LastRowAttention(attention="previous"), at, None)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("part", ["every", "text", "gathered"])
def test_text_attention_sums_over_raters(part: str) -> None:
    raters = np.array([0, 0, 1, 1.0])
    at = attended()
    wanted = (naive_weights(at, causal()).mean(axis=0)[V:] * raters[:, None]).sum(axis=0)[:V]
    rows = {"every": range(R), "text": range(V, R), "gathered": [1, 4, *range(V, R)]}[part]
    at = replace(at, queries=at.queries[:, :, list(rows)])
    found = ranking.by_previous_layer(TextAttention(), at, torch.tensor(raters, dtype=torch.float32))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_raters_are_text_rows_after_the_image_that_images_look_at() -> None:
    visual, text = drawn(V, D, seed=4), drawn(len(TEXT), D, seed=5)
    after = [i for i, place in enumerate(TEXT) if place > max(VISUAL)]
    looks = np.array([[float(v @ text[i]) for i in after] for v in visual])
    share = np.exp(looks) / np.exp(looks).sum(axis=1, keepdims=True)
    wanted = np.zeros(len(TEXT))
    wanted[after] = share.mean(axis=0) >= share.mean(axis=0).mean()
    found = ranking.raters_of(visual, text, torch.tensor(VISUAL), torch.tensor(TEXT), fill=0)
    assert found.tolist() == wanted.tolist()
    assert 0 < wanted.sum() < len(after)
    nothing = ranking.raters_of(visual[:0], text[:1], torch.zeros(0), torch.tensor([30]), fill=0)  # at decode
    assert nothing.isfinite().all()


def test_value_influence_is_the_length_of_what_a_value_adds() -> None:
    at = attended(past=PAST)
    weights = naive_weights(at, causal(PAST))
    wanted = []
    for j in range(PAST, PAST + V):
        added = [weights[h, -1, j] * at.values[0, h * G // H, j].double().numpy() for h in range(H)]
        wanted.append(np.linalg.norm(np.concatenate(added)))
    np.testing.assert_allclose(ranking.by_previous_layer(ValueInfluence(), at, None), wanted, atol=1e-6)


def test_a_threshold_hides_keys_from_the_ranking() -> None:
    shown = [True, False, True, True, False, True]
    at = attended(PAST, stream=stream_of(shown=shown), past_visible=torch.tensor([False, True, True]))
    sees = causal(PAST) & np.array([False, True, True, *shown, *[True] * len(TEXT)])
    last = naive_weights(at, sees)[:, -1]
    found = ranking.by_previous_layer(LastRowAttention(attention="previous"), at, None)
    np.testing.assert_allclose(found, last.mean(axis=0)[PAST : PAST + V], atol=1e-6)
    assert [score > 0 for score in found.tolist()] == shown


def test_cross_and_self_attention() -> None:
    at = attended()
    most = naive_weights(at, causal()).max(axis=0)
    wanted = most[V:, :V].sum(axis=0) * most[:V, :V].sum(axis=0)
    np.testing.assert_allclose(
        ranking.cross_and_self_attention(at.weights(), 0, at.stream), wanted, atol=1e-6
    )


def test_random_order_is_the_same_in_every_image() -> None:
    places = np.random.default_rng(7).permutation(5)
    found = ranking.random_order(7, 5, of_rows(0, 3, 4, 5, 9))
    assert found.tolist() == [places[0], places[3], places[4], places[0], places[4]]


def test_choice_takes_the_best_and_ties_go_to_the_lower_row() -> None:
    rows, none = of_rows(2, 3, 5, 8, 9), torch.zeros(0, dtype=torch.long)
    scores = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0])
    assert ranking.choose(scores, 3, none, rows).tolist() == [1, 2, 3]
    assert ranking.choose(scores * 0, 2, none, rows).tolist() == [0, 1]
    assert ranking.choose(scores, 2, torch.tensor([2, 8]), rows).tolist() == [0, 3]
    assert ranking.choose(scores[:0], 0, none, of_rows()).tolist() == []


@pytest.mark.parametrize("past", [0, PAST])
@pytest.mark.parametrize(
    ("mask", "text_keys"),
    [("additive", "live"), ("additive", "none"), *(("post_softmax", k) for k in ("live", "none", "sink"))],
)
@pytest.mark.parametrize("visual_keys", ["live", "none"])
@pytest.mark.parametrize("threshold", [False, True])
def test_hidden_keys(past: int, text_keys: str, visual_keys: str, mask: str, threshold: bool) -> None:
    shown = [False, True, True, False, True, True] if threshold else [True] * V
    row = Row(
        layer=0, live=V, after=V, masked_by=0 if threshold else None,
        text_keys=text_keys, visual_keys=visual_keys,  # type: ignore[arg-type]
    )  # fmt: skip
    past_visible = torch.tensor([True, False, True][:past], dtype=torch.bool)
    at = attended(
        past, row,
        stream=stream_of(shown=shown if threshold else None),
        past_visible=past_visible if threshold else None,
    )  # fmt: skip
    before = past_visible.tolist() if threshold else [True] * past
    seen = causal(past) & np.array([*before, *shown, *[True] * len(TEXT)])
    hidden = np.zeros_like(seen)
    hidden[V:, past : past + V] = text_keys != "live"
    hidden[:V, past : past + V] = visual_keys != "live"
    if mask == "additive":
        weights = naive_weights(at, seen & ~hidden)
    else:
        weights = naive_weights(at, seen)
        lost = (weights * hidden).sum(axis=2)
        weights = weights * ~hidden
        if text_keys == "sink":
            weights[:, V:, past] += lost[:, V:]
    found = at.output(mask)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[0], naive_mixed(at, weights), atol=2e-6)


def test_a_row_that_sees_no_key_gets_zeros() -> None:
    """An image at the very start: its first row sees nothing but its own key, and that is hidden."""
    stream = Stream.of(drawn(3, D), torch.arange(3), torch.arange(2))
    few: dict[str, Any] = {
        "queries": drawn(1, H, 3, C),
        "keys": drawn(1, G, 3, C),
        "values": drawn(1, G, 3, C),
    }
    row = Row(layer=0, live=2, after=2, visual_keys="none")
    out = attended(row=row, stream=stream, **few).output("additive")
    assert not out[:, :, :2].any() and out[:, :, 2].all()
    hiding = Stream.of(stream.hidden, stream.positions, stream.index, shown=torch.tensor([False, True, True]))
    out = attended(row=Row(layer=0, live=2, after=2, masked_by=0), stream=hiding, **few).output("additive")
    assert not out[:, :, 0].any() and out[:, :, 1:].all()


@pytest.mark.parametrize(("entropy", "correlation"), [(True, True), (True, False), (False, True)])
def test_skip_accumulator_grows(entropy: bool, correlation: bool) -> None:
    stream, head = stream_of(), torch.nn.Linear(D, 9, bias=False)
    rows, text = stream.hidden[:V].double().numpy(), stream.hidden[V:].double().numpy()
    weight = head.weight.detach().double().numpy()
    terms = []
    if entropy:
        odds = [np.exp(weight @ h) / np.exp(weight @ h).sum() for h in rows]
        terms.append([-(p * np.log(p)).sum() for p in odds])
    if correlation:
        mean = text.mean(axis=0)
        terms.append([h @ mean / np.linalg.norm(h) / np.linalg.norm(mean) for h in rows])
    total = sum((np.array(t) - min(t)) / (max(t) - min(t)) for t in terms)
    mode = SkipMode(stages=(SkipStage(layer=0, count=1),), entropy=entropy, correlation=correlation)
    np.testing.assert_allclose(gain(mode, stream, head).detach(), np.maximum(1 - total, 0), atol=1e-5)
    assert gain(mode, stream_of(1), head).tolist() == [1.0]  # constant terms are 0
    assert gain(mode, stream_of(0), head).tolist() == []


def test_rows_in_skip_mode_stay_and_the_highest_join() -> None:
    none = torch.zeros(0, dtype=torch.long)
    row, later = Row(layer=2, live=3, after=3), Row(layer=3, live=3, after=3)
    gained = torch.tensor([0.0, 0.3, 0, 0, 0.3, 0.3])
    stream, first = enter(row, stream_of(), None, gained=gained, count=2, forced=none)
    assert first.rows.tolist() == [1, 4]  # ties go to the lower row
    assert stream.unskipped and stream.unskipped.rows.tolist() == [0, 2, 3, 5, *range(V, R)]
    gained = torch.tensor([0.5, 0.0, 0, 0.9, 0, 0.1])
    _, second = enter(later, stream, first, gained=gained, count=4, forced=none)
    assert second.rows.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(second.accumulator, [0.5, 0.3, 0, 0.9, 0.3, 0.4])
    other = torch.tensor([0, 2, 3, 5])
    stream, forced = enter(later, stream, first, gained=gained, count=4, forced=other)
    assert forced.rows.tolist() == other.tolist()
    assert stream.unskipped and stream.unskipped.rows.tolist() == [1, 4, *range(V, R)]
    decode = Stream.of(drawn(1, D), torch.tensor([30]), torch.arange(0))
    stream, after = enter(row, decode, None, gained=torch.zeros(0), count=0, forced=none)
    assert after.rows.tolist() == [] and stream.unskipped and stream.unskipped.rows.tolist() == [0]


@pytest.mark.parametrize("part", [EveryRow(), TextRows(V), GatheredRows(torch.tensor([0, 7, 9]), "some")])
def test_parts_put_back_what_they_took(part: EveryRow | TextRows | GatheredRows) -> None:
    x = drawn(R, D)
    rows = {"every": range(R), "text": range(V, R), "some": [0, 7, 9]}[part.name]
    assert torch.equal(part.take(x), x[list(rows)])
    changed = part.put(x, part.take(x) + 1)
    assert torch.equal(changed, x + torch.tensor([[float(i in rows)] for i in range(R)]))
