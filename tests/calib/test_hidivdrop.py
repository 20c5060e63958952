"""What HiDivDrop decides from given curves; budgets for a mean are in `test_pyramid.py`."""

from __future__ import annotations

import numpy as np
import pytest
from fake_probe import SPEC, FakeProbe, run
from msgspec import structs

from trimvlm.errors import UserError
from trimvlm.profile import Decisions
from trimvlm.schedule import resolve
from trimvlm_calib.methods import hidivdrop


def attention_with_peaks(layers, tokens, window, peaks):
    """[L, H, N]: at the layers of `peaks` the heads' pattern is the same as `window` layers later."""
    generator = np.random.default_rng(0)
    attention = generator.random((layers, 4, tokens)) ** 4
    for layer in peaks:
        attention[layer + window] = attention[layer]
    return attention.astype(np.float32)


def hidivdrop_probe(peaks):
    similarity = tuple(1.0 - 0.01 * (layer in {8, 20}) - 0.001 * layer / 32 for layer in range(32))
    divergences = [1.0] * 24 + [0.001] * 8
    attention = [attention_with_peaks(32, 576, 4, peaks)] * 2
    return FakeProbe(divergences, similarity, attention)


def test_hidivdrop_gives_the_published_schedule_from_the_published_curves():
    probe = hidivdrop_probe([10, 15, 17, 19])
    outcome = run("hidivdrop", probe)
    assert outcome.needs_adapted_weights
    assert (outcome.decisions.inject, outcome.decisions.exit) == (8, 24)
    assert [(s.layer, s.keep) for s in outcome.decisions.select] == [(10, 215), (15, 10), (17, 5), (19, 1)]
    assert {s.by.attention for s in outcome.decisions.select} == {"own"}
    assert probe.asked["ILVAS"] == Decisions(inject=8, exit=24)
    ilvas = outcome.curves["ilvas"]
    assert [layer for layer, value in enumerate(ilvas) if value is not None] == list(range(8, 20))
    assert ilvas[10] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("keep", "filters"),
    [("tok64", [10, 14, 16, 18]), ("tok48", [10, 14, 16, 18]), ("tok80", [10, 13, 16, 19])],
)
def test_hidivdrop_published_schedules(keep, filters):
    outcome = run("hidivdrop", FakeProbe(), keep=keep, layers="published")
    assert (outcome.decisions.inject, outcome.decisions.exit) == (8, 24)
    assert [select.layer for select in outcome.decisions.select] == filters
    assert resolve(outcome.decisions, SPEC).mean_visual_tokens == pytest.approx(int(keep[3:]), abs=0.05)
    assert outcome.curves == {}


def test_hidivdrop_published_schedule_of_a_small_model():
    """12 layers and 196 tokens: every mark at its share of the depth, the next free layer where two meet."""
    spec = structs.replace(SPEC, layers=12, visual_tokens=196)
    decisions = run("hidivdrop", FakeProbe(spec=spec), layers="published").decisions
    assert (decisions.inject, decisions.exit) == (3, 9)
    assert [(s.layer, s.keep) for s in decisions.select] == [(4, 73), (5, 3), (6, 2), (7, 1)]


def test_hidivdrop_finds_budgets_for_a_mean():
    probe = hidivdrop_probe([10, 15, 17, 19])
    decisions = run("hidivdrop", probe, mean=100 / 576).decisions
    assert [select.layer for select in decisions.select] == [10, 15, 17, 19]
    assert resolve(decisions, SPEC).mean_visual_tokens == pytest.approx(100, abs=0.5)
    with pytest.raises(UserError, match=r"mean: 576 tokens cannot be reached .* 288 can"):
        run("hidivdrop", hidivdrop_probe([10, 15, 17, 19]), mean=1)


def test_hidivdrop_exits_where_the_plateau_begins():
    assert hidivdrop.plateau((None, 0.001, 0.5, 0.003, 0.001, 0.002), 0.003) == 3  # not 1, as vtw would
    with pytest.raises(UserError, match=r"no plateau within 0\.003 nats: at layer 2 the divergence is 0\.1"):
        hidivdrop.plateau((None, 0.001, 0.1), 0.003)


def test_ilvas_is_the_papers_formula():
    probe = hidivdrop_probe([])
    parameters = hidivdrop.Parameters(window=3 / 32, top=5 / 576)
    got = hidivdrop._ilvas(probe, Decisions(inject=8, exit=24), parameters)
    for layer in (8, 13, 20):
        values = []
        for sample in hidivdrop_probe([]).attention:
            now, later = sample[layer].astype(float), sample[layer + 3].astype(float)
            tokens = sorted(range(576), key=lambda i: -now[:, i].sum())[:5]
            cosines = [
                now[:, i] @ later[:, i] / (now[:, i] @ now[:, i]) ** 0.5 / (later[:, i] @ later[:, i]) ** 0.5
                for i in tokens
            ]
            values.append(sum(cosines) / 5)
        assert got[layer] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert got[21] is None


def test_ilvas_of_tokens_that_nobody_attends_to_is_zero():
    probe = hidivdrop_probe([])
    for sample in probe.attention:
        sample[11] = 0.0
    got = hidivdrop._ilvas(probe, Decisions(inject=8, exit=24), hidivdrop.Parameters(window=3 / 32))
    assert got[8] == got[11] == 0.0


def test_hidivdrop_extrema():
    curve = (9.0, 1.0, 3.0, 2.0, 2.0, 5.0, None)
    assert hidivdrop.extrema(curve, "maxima", 1, 9) == [2, 5]
    assert hidivdrop.extrema(curve, "maxima", 1, 1) == [5]
    assert hidivdrop.extrema(curve, "minima", 1, 9) == [1, 3]
    assert hidivdrop.first_minimum((1.0, 0.5, 0.5, 0.7)) == 1
    with pytest.raises(UserError, match="no local minimum"):
        hidivdrop.first_minimum((1.0, 0.9, 0.8))


def test_hidivdrop_without_room_for_a_filter():
    probe = hidivdrop_probe([])
    probe.divergences = [0.0] * 32
    with pytest.raises(UserError, match="smaller window"):
        run("hidivdrop", probe)
