"""Pictures of calibration curves: what is in them, not how they look."""

from __future__ import annotations

import sys

import pytest
from msgspec import structs

from trimvlm.errors import UserError
from trimvlm.profile import Calibration, Decisions, LayerRule, Method, ModelSpec, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm_calib.curves import check_drawing, chosen_layers, curve_figure, draw_curves

OWN = LastRowAttention(attention="own")
MODEL = ModelSpec(
    family="llava", layers=6, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=9, visual_tokens=16
)
PROFILE = Profile(
    name="hidivdrop+v-skip",
    method=Method(name="hidivdrop+v-skip"),
    model=MODEL,
    decisions=Decisions(
        inject=1,
        exit=5,
        select=(Select(layer=2, keep=9, by=OWN), Select(layer=4, keep=3, by=OWN)),
        layers=(LayerRule(layers=(1, 3), query="none"),),
    ),
    calibration=Calibration(
        data="mine",
        samples=2,
        seed=0,
        curves={"vig": (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), "ilvas": (None, None, 0.5, 0.25, None, None)},
    ),
)


def test_what_is_chosen():
    assert chosen_layers(PROFILE.decisions) == ({1, 3}, {"inject": [1], "select": [2, 4], "exit": [5]})
    assert chosen_layers(Decisions()) == (set(), {})


def test_each_curve_has_a_panel_with_its_values_and_marks():
    figure = curve_figure(PROFILE)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["vig", "ilvas"]
    points, dots, *marks = figure.axes[0].lines
    assert points.get_xydata().tolist() == [[layer, 6.0 - layer] for layer in range(6)]
    assert dots.get_xydata().tolist() == [[1, 5.0], [3, 3.0]]
    assert [(line.get_label(), line.get_xdata()[0]) for line in marks] == [
        ("inject", 1),
        ("select", 2),
        ("select", 4),
        ("exit", 5),
    ]
    points, dots, *_ = figure.axes[1].lines
    assert points.get_xydata().tolist() == [[2, 0.5], [3, 0.25]]  # only where it was measured
    assert dots.get_xydata().tolist() == [[3, 0.25]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["chosen", "inject", "select", "exit"]


def test_nothing_measured_nothing_drawn(tmp_path):
    bare = structs.replace(PROFILE, calibration=None)
    assert curve_figure(bare) is None
    assert not draw_curves(bare, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_same_profile_gives_the_same_bytes(tmp_path, suffix, start):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    assert draw_curves(PROFILE, one) and draw_curves(PROFILE, two)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a\.pdf: curves are drawn to \.svg or \.png"):
        check_drawing(tmp_path / "a.pdf")
    with pytest.raises(UserError, match=r"there is no directory .*nowhere"):
        check_drawing(tmp_path / "nowhere" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        check_drawing(tmp_path / "a.svg")
