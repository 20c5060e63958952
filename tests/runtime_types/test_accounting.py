"""Published figures, recomputed from the Schedule alone, and small cases counted by hand.

Section numbers are those of the methods' papers; n visual rows, t text rows. Papers round or truncate, so
"at published precision" means within one unit of the last printed digit.

Not tested, because no reading of the papers reproduces them (ours in brackets): SPIDER's rows for FastV at
R=75 % 2.6 (3.12) and R=89 % 8.5 (7.41), VisPruner with 128 tokens 2.3 (2.55), LLaVA-NeXT with 1600 tokens
21.8 (23.05) and 640 tokens 9.1 (9.42), ShortV l=31 2.1 (2.33) and N=29 9.7 (10.49), its own N=144 2.2
(2.50-2.59); VisiPruner's attention-only column and its 13B row 3.31 (needs 18 full-width layers); PAR's
absolute TFLOPs (their text length is not given).
"""

from __future__ import annotations

from decimal import Decimal

import pytest

from trimvlm.accounting import kv_bytes_per_layer, left_out, mac2, macv, selection_flops
from trimvlm.encoder_rules import EncoderStage
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    RouterScores,
    SelectionRule,
    TextAttention,
    ValueInfluence,
)
from trimvlm.schedule import Schedule, resolve

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
TERA = 1e12


def geometry(
    hidden: int, ffn: int, layers: int, visual: int, *, heads: int = 32, kv_heads: int = 0
) -> ModelSpec:
    return ModelSpec(
        family="llava",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=32000,
        visual_tokens=visual,
    )


def llava_7b(visual: int = 576) -> ModelSpec:
    return geometry(4096, 11008, 32, visual)


def mobilellama(visual: int = 576) -> ModelSpec:
    return geometry(2560, 6912, 32, visual)  # MobileLLaMA-2.7B


def stages(*layer_keep: tuple[int, int], by: LastRowAttention = OWN) -> tuple[Select, ...]:
    return tuple(Select(layer=layer, keep=keep, by=by) for layer, keep in layer_keep)


def schedule(model: ModelSpec, **decisions: object) -> Schedule:
    return resolve(Decisions(**decisions), model)  # type: ignore[arg-type]


def v_skip(*layers: int) -> tuple[LayerRule, ...]:
    return (LayerRule(layers=layers, query="none"),)


def short_v(*layers: int) -> tuple[LayerRule, ...]:
    return (LayerRule(layers=layers, query="none", ffn="none"),)


# ShortV's published lists (its README), N = 19, 0-based.
SHORTV_7B = short_v(31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
SHORTV_NEXT = short_v(31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2)
# VisiPruner App. M: shallow layers without attention over visual keys, 9 middle layers at 10.3 tokens on
# average (10 here), exit at 24.
VISIPRUNER = {
    "layers": (LayerRule(layers=tuple(range(15)), visual_keys="none"),),
    "select": stages((15, 10)),
    "exit": 24,
}


@pytest.mark.parametrize(
    ("published", "model", "decisions", "ours"),
    [
        pytest.param(
            "3.82", llava_7b(), {}, 3.8172, id="LLaVA-1.5-7B (HiDivDrop Table 2, VisiPruner Table 5)"
        ),
        pytest.param(
            "7.44",
            geometry(5120, 13824, 40, 576, heads=40),
            {},
            7.4441,
            id="LLaVA-1.5-13B (VisiPruner)",
        ),
        pytest.param("0.37", mobilellama(144), {}, 0.3688, id="MobileVLM, 144 tokens (VisiPruner Table 5)"),
        pytest.param("1.52", mobilellama(), {}, 1.5160, id="MobileLLaMA-2.7B (HiDivDrop Table 2)"),
        pytest.param(
            "1.78",
            llava_7b(),
            {"select": stages((8, 288), (16, 144), (24, 72)), "positions": "compact"},
            1.7774,
            id="PyramidDrop (HiDivDrop Table 2)",
        ),
        pytest.param(
            "0.70",
            mobilellama(),
            {"select": stages((8, 288), (16, 144), (24, 72)), "positions": "compact"},
            0.7032,
            id="PyramidDrop on MobileLLaMA-2.7B (HiDivDrop Table 2)",
        ),
        pytest.param(
            "0.42",
            llava_7b(),
            {"inject": 8, "exit": 24, "select": stages((10, 215), (14, 10), (16, 5), (18, 1))},
            0.4214,
            id="HiDivDrop, 64 tokens (Table 2)",
        ),
        pytest.param(
            "0.17",
            mobilellama(),
            {"inject": 14, "exit": 27, "select": stages((16, 283), (19, 10), (22, 5), (25, 1))},
            0.1670,
            id="HiDivDrop on MobileLLaMA-2.7B (Table 2; keep inferred from the mean of 64)",
        ),
        pytest.param("1.76", llava_7b(), VISIPRUNER, 1.7667, id="VisiPruner 7B (Table 5, App. M)"),
    ],
)
def test_published_macv(published: str, model: ModelSpec, decisions: dict[str, object], ours: float) -> None:
    measured = macv(schedule(model, **decisions)) / TERA
    assert measured == pytest.approx(ours, abs=5e-5)
    assert abs(measured - float(published)) < _last_digit(published)


@pytest.mark.parametrize(
    ("published", "model", "text", "decisions", "ours"),
    [
        pytest.param("8.54", llava_7b(), 67, {}, 8.5449, id="LLaVA-1.5-7B, n+t=643 (V-Skip Table 3)"),
        pytest.param("7.69", llava_7b(), 67, {"layers": v_skip(*range(13, 32))}, 7.6952, id="V-Skip N=19"),
        pytest.param("4.7", llava_7b(), 67, {"exit": 16}, 4.7075, id="VTW (SPIDER Table 1)"),
        pytest.param("4.94", llava_7b(), 67, {"exit": 17}, 4.9474, id="VTW as V-Skip counts it: 17 dense"),
        pytest.param(
            "4.9",
            llava_7b(),
            67,
            {"select": stages((2, 288), by=PREVIOUS)},
            4.9066,
            id="FastV (SPIDER Table 1)",
        ),
        pytest.param(
            "4.7", llava_7b(288), 67, {}, 4.6640, id="VisPruner, 288 tokens before the decoder (SPIDER)"
        ),
        pytest.param("4.7", llava_7b(), 67, {"layers": SHORTV_7B}, 4.7345, id="ShortV N=19 (SPIDER Table 1)"),
        pytest.param("42.7", llava_7b(2880), 67, {}, 42.7229, id="LLaVA-NeXT-7B, n+t=2947 (SPIDER Table 1)"),
        pytest.param("21.8", llava_7b(2880), 67, {"exit": 16}, 21.7965, id="LLaVA-NeXT, VTW"),
        pytest.param("21.6", llava_7b(2880), 67, {"layers": SHORTV_NEXT}, 21.6051, id="LLaVA-NeXT, ShortV"),
        pytest.param(
            "22.0",
            llava_7b(2880),
            67,
            {"select": stages((2, 1440), by=PREVIOUS)},
            22.0852,
            id="LLaVA-NeXT, FastV",
        ),
        pytest.param("30.74", llava_7b(2134), 47, {}, 30.7422, id="LLaVA-NeXT, n+t=2181 (V-Skip Table 3)"),
        pytest.param(
            "26.57", llava_7b(2134), 47, {"layers": v_skip(*range(13, 32))}, 26.5724, id="LLaVA-NeXT, V-Skip"
        ),
    ],
)
def test_published_mac2(
    published: str, model: ModelSpec, text: int, decisions: dict[str, object], ours: float
) -> None:
    measured = mac2(schedule(model, **decisions), text) / TERA
    assert measured == pytest.approx(ours, abs=5e-5)
    assert abs(measured - float(published)) < _last_digit(published)


@pytest.mark.parametrize(
    ("published", "model", "text", "decisions", "ours"),
    [
        pytest.param(4.72, llava_7b(), 67, {"layers": SHORTV_7B}, 4.7345, id="ShortV N=19 (+0.3 %)"),
        pytest.param(15.73, llava_7b(2114), 67, {"layers": SHORTV_NEXT}, 15.7453, id="NeXT, ShortV (+0.1 %)"),
        pytest.param(16.91, llava_7b(2114), 67, {"exit": 17}, 16.7397, id="NeXT, VTW (-1.0 %)"),
    ],
)
def test_published_mac2_that_miss_the_last_digit(
    published: float, model: ModelSpec, text: int, decisions: dict[str, object], ours: float
) -> None:
    """V-Skip's Table 3 gives no n and t for each row; these stay within 1.2 % under the nearest reading."""
    measured = mac2(schedule(model, **decisions), text) / TERA
    assert measured == pytest.approx(ours, abs=5e-5)
    assert measured == pytest.approx(published, rel=0.012)


def test_fastv_and_its_composition_with_v_skip() -> None:
    """V-Skip Table 2: 61.66 % and 56.73 %; five dense layers, one skipped layer among them (layer 0)."""
    dense = mac2(schedule(llava_7b()), 67)
    fastv = {"select": stages((5, 288), by=PREVIOUS)}
    both = fastv | {"layers": v_skip(0, *range(14, 32))}
    assert 100 * mac2(schedule(llava_7b(), **fastv), 67) / dense == pytest.approx(61.66, abs=0.025)
    assert 100 * mac2(schedule(llava_7b(), **both), 67) / dense == pytest.approx(56.7315, abs=5e-5)


@pytest.mark.parametrize(
    ("published", "first", "layers"),
    [(64.0, 215, (10, 14, 16, 18)), (48.0, 87, (10, 14, 16, 18)), (80.03, 453, (10, 13, 16, 19))],
)
def test_hidivdrop_mean_tokens(published: float, first: int, layers: tuple[int, ...]) -> None:
    """HiDivDrop's official scripts: 80, 64 and 48 tokens are means over all 32 layers."""
    keep = stages(*zip(layers, (first, 10, 5, 1), strict=True))
    hidivdrop = schedule(llava_7b(), inject=8, exit=24, select=keep)
    assert hidivdrop.mean_visual_tokens == pytest.approx(published, abs=0.005)


def test_pyramiddrop_mean_tokens() -> None:
    """PyramidDrop Table 1: 270."""
    assert schedule(llava_7b(), select=stages((8, 288), (16, 144), (24, 72))).mean_visual_tokens == 270


def test_mean_of_64_tokens_saves_89_percent() -> None:
    """HiDivDrop abstract: 88.9-89.0 %."""
    hidivdrop = schedule(llava_7b(), inject=8, exit=24, select=stages((10, 215), (14, 10), (16, 5), (18, 1)))
    assert 100 * (1 - macv(hidivdrop) / macv(schedule(llava_7b()))) == pytest.approx(89.0, abs=0.1)


def test_whole_layers_skipped() -> None:
    """PAR Table 1: 24 of 32 layers, 8.30 of 11.05 TFLOPs; a ratio, since the text length is not given."""
    skipped = schedule(llava_7b(), layers=(LayerRule(layers=tuple(range(24, 32)), execute="none"),))
    assert mac2(skipped, 67) / mac2(schedule(llava_7b()), 67) == pytest.approx(8.30 / 11.05, abs=2e-3)


def test_kv_bytes() -> None:
    """fp16: 512 KiB for each token of LLaVA-1.5-7B (576: 288 MiB), 36 KiB for Qwen2.5-VL-3B's GQA."""
    dense = kv_bytes_per_layer(schedule(llava_7b()), text=0, bytes_per_value=2)
    assert dense == (9 * 2**20,) * 32
    grouped = schedule(geometry(2048, 11008, 36, 1, heads=16, kv_heads=2))
    assert sum(kv_bytes_per_layer(grouped, text=0, bytes_per_value=2)) == 36 * 2**10


def test_kv_bytes_follow_what_is_cached() -> None:
    """Two values of 2 bytes, one head of 4: 16 bytes a row; dropped, hidden and unexecuted rows have none."""
    small = schedule(
        geometry(4, 8, 5, 6, heads=1),
        select=stages((1, 3)),
        exit=4,
        layers=(LayerRule(layers=(2,), cache="none"), LayerRule(layers=(3,), execute="none")),
    )
    assert kv_bytes_per_layer(small, text=2, bytes_per_value=2) == (16 * 8, 16 * 5, 16 * 2, 0, 16 * 2)


def test_flops_counted_by_hand_with_grouped_heads() -> None:
    """D=6, H=3 of C=2 (so Q and O are 6 wide), G=1 (K and V 2 wide), F=5; 2 visual rows, 1 text row."""
    model = geometry(6, 5, 1, 2, heads=3, kv_heads=1)
    per_row = 6 * 6 * 2 + 6 * 2 * 2 + 3 * 6 * 5  # Q and O, K and V, three FFN matrices
    assert macv(schedule(model)) == 2 * per_row + 2 * 2 * 6 * 2  # QK^T and PV: 2 x 2 pairs, 6 wide, twice
    assert mac2(schedule(model), text=1) == 2 * (3 * per_row + 3 * 3 * 6 * 2)
    skipping = schedule(model, layers=v_skip(0))
    assert mac2(skipping, text=1) == 2 * (3 * per_row - 2 * (6 * 6 * 2) + 1 * 3 * 6 * 2)
    hidden = schedule(model, layers=(LayerRule(layers=(0,), text_keys="none"),))
    assert mac2(hidden, text=1) == 2 * (3 * per_row + (1 * 1 + 2 * 3) * 6 * 2)


def test_selection_counted_by_hand() -> None:
    """One query row against all keys; own scores also compute the keys of the rows that drop out."""
    model = geometry(6, 5, 2, 4, heads=3, kv_heads=1)
    borrowed = schedule(model, select=stages((1, 1), by=PREVIOUS))
    assert selection_flops(borrowed, text=1) == 2 * 6 * (4 + 1)
    own = schedule(model, select=stages((1, 1)))
    assert selection_flops(own, text=1) == 2 * 6 * (4 + 1) + 2 * 3 * 6 * 2


def test_encoder_stage_is_a_shorter_image() -> None:
    """VisPruner with 288 tokens (SPIDER Table 1): what the decoder computes is that of a model with 288."""
    before = schedule(llava_7b(), encoder=EncoderStage(keep=288, by=RandomOrder()))
    assert mac2(before, 67) == mac2(schedule(llava_7b(288)), 67)
    assert kv_bytes_per_layer(before, 67, 2) == kv_bytes_per_layer(schedule(llava_7b(288)), 67, 2)


def test_parts_of_a_layer_counted_by_hand() -> None:
    """The model of the test above, 4 visual rows and 1 text row; what is left out is taken off."""
    model = geometry(6, 5, 1, 4, heads=3, kv_heads=1)
    q = o = 6 * 6
    kv, ffn, pair = 2 * 6 * 2, 3 * 6 * 5, 2 * 6
    all_rows = 5 * (q + o + kv + ffn) + 5 * 5 * pair

    def count(**rule: object) -> int:
        return mac2(schedule(model, layers=(LayerRule(layers=(0,), **rule),)), text=1)  # type: ignore[arg-type]

    assert count(query="live") == 2 * all_rows
    assert count(sublayers="ffn") == 2 * 5 * ffn
    assert count(sublayers="attention") == 2 * (all_rows - 5 * ffn)
    assert count(execute="decode") == 2 * 5 * kv
    assert count(execute="none") == 0
    skip = SkipMode(stages=(SkipStage(layer=0, count=3),))
    bypass = schedule(model, skip=skip, layers=(LayerRule(layers=(0,), query="unskipped"),))
    assert mac2(bypass, text=1) == 2 * (all_rows - 3 * (q + o) - 3 * 5 * pair)
    bypass = schedule(model, skip=skip, layers=(LayerRule(layers=(0,), ffn="unskipped"),))
    assert mac2(bypass, text=1) == 2 * (all_rows - 3 * ffn)
    inside = schedule(model, select=(Select(layer=0, keep=1, by=CrossAndSelfAttention()),))
    assert mac2(inside, text=1) == 2 * (all_rows - 3 * (o + ffn))  # the rows that leave still attend


def test_what_the_last_layer_leaves_out_counted_by_hand() -> None:
    """The model of the tests above with two layers: 4 of 5 rows are spared past keys and values."""
    model = geometry(6, 5, 2, 4, heads=3, kv_heads=1)
    q = o = 6 * 6
    ffn, pair = 3 * 6 * 5, 2 * 6

    def count(layer: int = 1, **rule: object) -> int:
        return left_out(schedule(model, layers=(LayerRule(layers=(layer,), **rule),)), text=1)  # type: ignore[arg-type]

    every = 2 * 4 * (q + o + 5 * pair + ffn)
    assert count(query="live") == count(layer=0, execute="none") == every
    assert count(query="none", ffn="none") == 0  # the text row runs alone
    assert count(text_keys="none") == 2 * 4 * (q + o + 5 * pair + ffn)
    assert count(sublayers="ffn") == 2 * 4 * ffn
    assert count(sublayers="attention") == 2 * 4 * (q + o + 5 * pair)
    assert count(execute="decode") == count(execute="none") == 0
    assert (
        left_out(schedule(model, select=(Select(layer=1, keep=1, by=CrossAndSelfAttention()),)), text=1) == 0
    )


def test_entropy_costs_a_language_model_head() -> None:
    """SPIDER's entropy term: 576 x 32000 x 4096 = 75.5 GMAC, 63 % of what a layer spends on visual rows."""
    skip = SkipMode(stages=(SkipStage(layer=8, count=100),), correlation=False)
    spider = schedule(llava_7b(), skip=skip, layers=(LayerRule(layers=(9,), query="unskipped"),))
    cost = selection_flops(spider, text=67) / 2
    assert cost == pytest.approx(75.5e9, rel=1e-3)
    assert cost / (macv(schedule(llava_7b())) / 32) == pytest.approx(0.63, abs=0.005)


def test_rules_counted_by_hand() -> None:
    """Two layers, 4 visual rows and 1 text row, heads 6 wide in all, keys and values 2 wide."""
    model = geometry(6, 5, 2, 4, heads=3, kv_heads=1)

    def cost(rule: SelectionRule) -> int:
        return selection_flops(schedule(model, select=(Select(layer=1, keep=1, by=rule),)), text=1)

    assert cost(TextAttention()) == 2 * (6 * 1 * (4 + 1) + 4 * 1 * 6)  # weights of text rows, raters
    assert cost(ValueInfluence()) == 2 * (6 * (4 + 1) + 4 * 2)  # last row's weights, norms of values
    assert cost(RandomOrder()) == cost(RouterScores()) == cost(CrossAndSelfAttention()) == 0


def _last_digit(printed: str) -> float:
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int)
    return 10.0**exponent
