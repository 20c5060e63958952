"""The Schedule: every refusal once, and what holds for whatever is not refused."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from trimvlm.accounting import kv_bytes_per_layer, mac2, macv, selection_flops
from trimvlm.encoder_rules import EncoderStage, MsvPrune, PruMerge, VisionZip
from trimvlm.errors import UserError
from trimvlm.profile import (
    Decisions,
    LayerRule,
    Method,
    ModelSpec,
    Profile,
    Select,
    SkipMode,
    SkipStage,
    to_profile,
)
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    SelectionRule,
    TextAttention,
    ValueInfluence,
)
from trimvlm.schedule import Row, Schedule, resolve

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")


def model(layers: int = 6, visual: int = 16) -> ModelSpec:
    return ModelSpec(
        family="llava",
        layers=layers,
        hidden=12,
        heads=4,
        kv_heads=2,
        head_dim=3,
        ffn=20,
        vocab=50,
        visual_tokens=visual,
    )


def rule(*layers: int, **fields: Any) -> tuple[LayerRule, ...]:
    return (LayerRule(layers=layers, **fields),)


def keep(layer: int, count: int, by: SelectionRule = OWN) -> tuple[Select, ...]:
    return (Select(layer=layer, keep=count, by=by),)


def skip(*stages: tuple[int, int]) -> SkipMode:
    return SkipMode(stages=tuple(SkipStage(layer=layer, count=count) for layer, count in stages))


HIDE = rule(2, text_keys="none")
UNSKIPPED = rule(4, query="unskipped")
INSIDE = CrossAndSelfAttention()
MSV = MsvPrune(attention=0, middle=1, last=2)


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        (Decisions(inject=6), r"inject: layer 6 is not within 0\.\.5"),
        (Decisions(inject=-1), r"inject: layer -1 is not within 0\.\.5"),
        (Decisions(exit=0), r"exit: layer 0 is not within 1\.\.6"),
        (Decisions(inject=3, exit=3), r"exit: layer 3 is not within 4\.\.6"),
        (Decisions(exit=7), r"exit: layer 7 is not within 1\.\.6"),
        (Decisions(inject=1, positions="compact"), "positions: late injection needs persistent"),
        (Decisions(positions="compact", layers=rule(1, cache="none")), "layer 1: cache: compact"),
        (Decisions(mask="post_softmax"), "mask: post_softmax has no effect"),
        (Decisions(layers=rule(1)), "layers: an entry needs layer numbers and at least one field"),
        (Decisions(layers=rule(query="none")), "layers: an entry needs layer numbers and at least one field"),
        (Decisions(layers=rule(6, query="none")), r"layers: layer 6 is not within 0\.\.5"),
        (
            Decisions(layers=rule(1, 2, query="none") + rule(2, query="live")),
            "layer 2: query: both none and live are asked for",
        ),
        (
            Decisions(inject=2, select=keep(1, 4)),
            r"layer 1: select: visual rows are live in .* 2\.\.5 only",
        ),
        (
            Decisions(exit=3, select=keep(3, 4)),
            r"layer 3: select: visual rows are live in .* 0\.\.2 only",
        ),
        (Decisions(select=keep(3, 0)), "layer 3: select.keep: 0 is less than 1; use exit"),
        (Decisions(select=keep(3, 4) + keep(3, 2)), "layer 3: select: two selections"),
        (Decisions(select=keep(0, 4, PREVIOUS)), "layer 0: select.by: no layer before it"),
        (
            Decisions(inject=2, select=keep(2, 4, PREVIOUS)),
            "layer 2: select.by: no layer before it",
        ),
        (Decisions(select=keep(1, 17)), "layer 1: select.keep: budget 17 grows from 16"),
        (Decisions(select=keep(1, 4) + keep(3, 5)), "layer 3: select.keep: budget 5 grows from 4"),
        (
            Decisions(layers=rule(1, execute="none", ffn="none")),
            "layer 1: ffn: has no effect in a layer",
        ),
        (
            Decisions(layers=rule(1, execute="none"), select=keep(1, 4)),
            "layer 1: select.by: own scores need the layer's attention to be",
        ),
        (Decisions(inject=2, layers=rule(1, query="none")), "layer 1: query: none has no effect, no visual"),
        (Decisions(exit=2, layers=rule(4, cache="none")), "layer 4: cache: none has no effect, no visual"),
        (
            Decisions(layers=rule(1, query="none", visual_keys="none")),
            "layer 1: visual_keys: none has no effect where query is none",
        ),
        (Decisions(layers=HIDE, select=keep(3, 4, PREVIOUS)), "layer 3: select.by: layer 2 has no"),
        (
            Decisions(layers=rule(2, execute="none"), select=keep(3, 4, PREVIOUS)),
            "layer 3: select.by: layer 2 has no attention",
        ),
        (Decisions(layers=HIDE, select=keep(2, 4)), "layer 2: select.by: own scores contradict"),
        # Encoder stage.
        (Decisions(encoder=EncoderStage(keep=0, by=RandomOrder())), r"encoder.keep: 0 is not within 1\.\.16"),
        (Decisions(encoder=EncoderStage(keep=17, by=RandomOrder())), "encoder.keep: 17 is not within"),
        (Decisions(encoder=EncoderStage(keep=9, by=MSV)), "encoder.by.clusters: 4 clusters cannot share 3"),
        (
            Decisions(encoder=EncoderStage(keep=3, by=VisionZip(contextual=3, attention=0, keys=0))),
            r"encoder.by.contextual: 3 is not within 0\.\.2",
        ),
        (
            Decisions(encoder=EncoderStage(keep=4, by=PruMerge(neighbours=17, layer=0))),
            r"encoder: prumerge needs keep of at least 2 and 1\.\.16 neighbours, not 4 and 17",
        ),
        (Decisions(encoder=EncoderStage(keep=8, by=RandomOrder()), select=keep(2, 9)), "budget 9 grows"),
        # Skip mode.
        (Decisions(skip=skip((2, 4))), "skip: has no effect where no layer's query or ffn is unskipped"),
        (Decisions(layers=UNSKIPPED), "layer 4: query: unskipped has no effect, no rows are in skip mode"),
        (
            Decisions(skip=skip((5, 4)), layers=UNSKIPPED),
            "layer 4: query: unskipped has no effect, no rows are in skip mode",
        ),
        (Decisions(skip=skip((2, 17)), layers=UNSKIPPED), r"layer 2: skip.stages: count 17 .* 1\.\.16"),
        (Decisions(skip=skip((3, 5), (2, 6)), layers=UNSKIPPED), "layer 2: skip.stages: layers rise"),
        (Decisions(skip=skip((2, 5), (3, 4)), layers=UNSKIPPED), "layer 3: skip.stages: layers rise"),
        (
            Decisions(skip=skip((2, 4)), layers=UNSKIPPED, select=keep(3, 8)),
            "layer 3: select: no selection at or after the first skip stage",
        ),
        (
            Decisions(skip=skip((2, 4), (5, 4)), layers=UNSKIPPED, exit=5),
            r"layer 5: skip.stages: visual rows are live in layers 0\.\.4",
        ),
        # Sinks.
        (Decisions(layers=rule(0, text_keys="sink")), "layer 0: text_keys: sink moves weights after"),
        (
            Decisions(layers=rule(2, text_keys="sink"), mask="post_softmax", select=keep(3, 4, PREVIOUS)),
            "layer 3: select.by: layer 2 has no attention from text",
        ),
        # Sub-layers and phases.
        (Decisions(layers=rule(1, sublayers="ffn", query="none")), "layer 1: query: has no effect in"),
        (Decisions(layers=rule(1, sublayers="attention", ffn="none")), "layer 1: ffn: has no effect"),
        (Decisions(layers=rule(1, sublayers="ffn", execute="none")), "layer 1: sublayers: has no effect"),
        (Decisions(layers=rule(1, sublayers="ffn", execute="decode")), "layer 1: sublayers: a layer that"),
        (Decisions(layers=rule(1, execute="decode", ffn="none")), "layer 1: ffn: has no effect in"),
        (Decisions(layers=rule(1, sublayers="ffn"), select=keep(1, 4)), "layer 1: select.by: own scores"),
        (
            Decisions(layers=rule(1, execute="decode"), select=keep(2, 4, PREVIOUS)),
            "layer 2: select.by: layer 1 has no attention",
        ),
        # Rules.
        (Decisions(select=keep(0, 4, ValueInfluence())), "layer 0: select.by: no layer before it"),
        (Decisions(select=keep(0, 4, TextAttention())), "layer 0: select.by: no layer before it"),
        (
            Decisions(select=keep(2, 4, INSIDE), layers=rule(2, query="none")),
            "layer 2: select.by: cross_and_self_attention needs every visual row",
        ),
        (
            Decisions(select=keep(2, 4, ValueInfluence(threshold=0.1)) + keep(3, 2, INSIDE)),
            "layer 3: select.by: cross_and_self_attention needs every visual row",
        ),
        (
            Decisions(select=keep(2, 4, INSIDE) + keep(3, 2, PREVIOUS)),
            "layer 3: select.by: layer 2 selects inside",
        ),
        (
            Decisions(select=keep(2, 4, INSIDE), positions="compact"),
            "layer 2: select.by: a selection inside a layer needs persistent",
        ),
    ],
)
def test_refusals(decisions: Decisions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(decisions, model())


def test_refuses_more_than_tensorrt_can_rank() -> None:
    resolve(Decisions(select=keep(1, 3840)), model(visual=5000))
    with pytest.raises(UserError, match=r"layer 1: select\.keep: TensorRT's TopK .* 3840, not 3841"):
        resolve(Decisions(select=keep(1, 3841)), model(visual=5000))


def test_refusals_name_the_profile_and_the_model_that_differs() -> None:
    profile = Profile(name="mine", method=Method(name="vtw"), model=model(), decisions=Decisions(exit=9))
    with pytest.raises(UserError, match=r"^profile mine: exit: layer 9 is not within"):
        Schedule.resolve(profile, model())
    with pytest.raises(UserError, match=r"^profile mine: model\.layers is 6, but this model has 7"):
        Schedule.resolve(profile, model(layers=7))


def test_dense_is_the_default_everywhere() -> None:
    assert resolve(Decisions(), model(layers=3)).rows == tuple(
        Row(layer=layer, live=16, after=16) for layer in range(3)
    )


def test_every_field_of_a_row() -> None:
    """Late injection, two stages, exit, and each per-layer exception, read off the table by hand."""
    schedule = resolve(
        Decisions(
            inject=1,
            exit=6,
            select=keep(2, 8) + keep(4, 3, PREVIOUS),
            layers=rule(3, query="none", cache="none") + rule(5, ffn="none") + rule(0, 7, execute="none"),
        ),
        model(layers=8),
    )
    assert [row.live for row in schedule.rows] == [0, 16, 8, 8, 3, 3, 0, 0]
    assert [row.queries for row in schedule.rows] == [0, 16, 8, 0, 3, 3, 0, 0]
    assert [row.ffn_rows for row in schedule.rows] == [0, 16, 8, 8, 3, 0, 0, 0]
    assert [row.cached for row in schedule.rows] == [0, 16, 8, 0, 3, 3, 0, 0]
    assert [schedule.live_before(layer) for layer in range(8)] == [0, 16, 16, 8, 8, 3, 0, 0]
    assert [row.layer for row in schedule.stages] == [2, 4]
    assert schedule.kv_groups == (16, 8, 0, 3)
    assert schedule.mean_visual_tokens == 38 / 8


def test_encoder_stage_bounds_the_decoder() -> None:
    schedule = resolve(Decisions(encoder=EncoderStage(keep=10, by=RandomOrder()), inject=1), model())
    assert schedule.visual_tokens == 10
    assert [row.live for row in schedule.rows] == [0, 10, 10, 10, 10, 10]
    assert schedule.live_before(1) == 10


def test_skip_mode_row_by_row() -> None:
    schedule = resolve(
        Decisions(
            skip=skip((1, 4), (3, 9)),
            exit=5,
            layers=rule(1, 2, query="unskipped") + rule(2, 4, ffn="unskipped") + rule(3, query="none"),
        ),
        model(),
    )
    assert [row.skipped for row in schedule.rows] == [0, 4, 4, 9, 9, 0]
    assert [row.queries for row in schedule.rows] == [16, 12, 12, 0, 16, 0]
    assert [row.ffn_rows for row in schedule.rows] == [16, 16, 12, 16, 7, 0]
    assert [row.cached for row in schedule.rows] == [16, 16, 16, 16, 16, 0]
    assert [row.layer for row in schedule.skip_stages] == [1, 3]


def test_selection_inside_a_layer_keeps_its_keys() -> None:
    schedule = resolve(Decisions(select=keep(1, 9, INSIDE) + keep(2, 4, INSIDE)), model(layers=4))
    assert [(row.live, row.after) for row in schedule.rows] == [(16, 16), (16, 9), (9, 4), (4, 4)]
    assert [row.queries for row in schedule.rows] == [16, 16, 9, 4]
    assert [row.ffn_rows for row in schedule.rows] == [16, 9, 4, 4]
    assert [row.cached for row in schedule.rows] == [16, 16, 9, 4]


def test_threshold_masks_until_the_exit() -> None:
    decisions = Decisions(
        exit=5,
        select=keep(1, 9, PREVIOUS) + keep(2, 6, ValueInfluence(threshold=0.5)) + keep(4, 3),
        layers=rule(4, cache="none"),
    )
    schedule = resolve(decisions, model())
    assert [row.masked_by for row in schedule.rows] == [None, None, 1, 1, 2, None]
    assert schedule.masks == (1,)  # layer 4 caches no visual rows, so its mask is of no use at decode


def test_layers_without_attention_or_prefill() -> None:
    schedule = resolve(
        Decisions(
            layers=rule(1, sublayers="ffn") + rule(2, sublayers="attention") + rule(3, execute="decode")
        ),
        model(),
    )
    assert [row.attends for row in schedule.rows] == [True, False, True, True, True, True]
    assert [row.queries for row in schedule.rows] == [16, 0, 16, 0, 16, 16]
    assert [row.ffn_rows for row in schedule.rows] == [16, 16, 0, 0, 16, 16]
    assert [row.cached for row in schedule.rows] == [16, 0, 16, 16, 16, 16]


@st.composite
def any_decisions(draw: st.DrawFn) -> tuple[ModelSpec, Decisions]:
    """Decisions of all kinds, most of them near the edge of what can be."""
    layers, visual = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    layer = st.integers(0, layers - 1)
    sides = st.sampled_from([None, None, "live", "none"])
    active = st.sampled_from([None, None, "live", "none", "unskipped"])
    stages = st.builds(SkipStage, layer=layer, count=st.integers(1, visual))
    rules = st.builds(
        LayerRule,
        layers=st.lists(layer, min_size=1, max_size=3, unique=True).map(tuple),
        query=active,
        text_keys=st.sampled_from([None, None, "live", "none", "sink"]),
        visual_keys=sides,
        ffn=active,
        cache=sides,
        execute=st.sampled_from([None, None, None, "both", "decode", "none"]),
        sublayers=st.sampled_from([None, None, None, "both", "attention", "ffn"]),
    )
    skips = st.builds(SkipMode, stages=st.lists(stages, min_size=1, max_size=2).map(tuple))
    encoders = st.builds(EncoderStage, keep=st.integers(1, visual), by=st.just(RandomOrder()))
    ways = [OWN, OWN, PREVIOUS, INSIDE, ValueInfluence(threshold=0.5), RandomOrder()]
    selects = st.builds(Select, layer=layer, keep=st.integers(1, visual), by=st.sampled_from(ways))
    decisions = Decisions(
        encoder=draw(st.none() | encoders),
        skip=draw(st.none() | skips),
        inject=draw(st.sampled_from([0, 0, 0, *range(layers)])),
        exit=draw(st.none() | st.integers(1, layers)),
        select=tuple(
            sorted(draw(st.lists(selects, max_size=2)), key=lambda select: (select.layer, -select.keep))
        ),
        layers=tuple(draw(st.lists(rules, max_size=2))),
        positions=draw(st.sampled_from(["persistent", "persistent", "compact"])),
        mask=draw(st.sampled_from(["additive", "additive", "post_softmax"])),
    )
    return model(layers, visual), decisions


# What a layer may be without, for all rows; most layers are whole.
WHOLE: list[dict[str, Any]] = [{}] * 6
WHOLE += [{"execute": "none"}, {"execute": "decode"}, {"sublayers": "attention"}, {"sublayers": "ffn"}]


@st.composite
def good_decisions(draw: st.DrawFn) -> tuple[ModelSpec, Decisions]:
    """Decisions that must not be refused, put together layer by layer."""
    layers, visual = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    compact = draw(st.booleans())
    inject = 0 if compact else draw(st.integers(0, layers - 1))
    exit_ = draw(st.integers(inject + 1, layers))
    fields: list[dict[str, Any]] = []
    for layer in range(layers):
        names = ["query", "text_keys", "visual_keys", "ffn", "cache"]
        hidden = draw(st.sets(st.sampled_from(names))) if inject <= layer < exit_ else set()
        hidden -= {"visual_keys"} if "query" in hidden else set()
        hidden -= {"cache"} if compact else set()
        whole: dict[str, Any] = draw(st.sampled_from(WHOLE))
        if whole.get("sublayers") == "ffn":
            hidden &= {"ffn"}
        if whole.get("sublayers") == "attention":
            hidden -= {"ffn"}
        if whole.get("execute") == "decode":
            hidden &= {"cache"}
        if whole.get("execute") == "none":
            hidden = set()
        fields.append({**whole, **dict.fromkeys(sorted(hidden), "none")})
    sees = ["execute" not in f and f.get("sublayers") != "ffn" and "text_keys" not in f for f in fields]
    selects: list[Select] = []
    encoder = draw(
        st.none() | st.builds(EncoderStage, keep=st.integers(1, visual), by=st.just(RandomOrder()))
    )
    live = encoder.keep if encoder else visual
    for layer in range(inject, exit_):
        ways: list[SelectionRule] = [RandomOrder()]
        ways += [OWN] * sees[layer] + [PREVIOUS] * (layer > inject and sees[layer - 1])
        if draw(st.booleans()):
            live = draw(st.integers(1, live))
            selects.append(Select(layer=layer, keep=live, by=draw(st.sampled_from(ways))))
    hides = any({"text_keys", "visual_keys"} & said.keys() for said in fields)
    pieces = [
        LayerRule(layers=(layer,), **{field: value})
        for layer, said in enumerate(fields)
        for field, value in said.items()
    ]
    decisions = Decisions(
        encoder=encoder,
        inject=inject,
        exit=None if exit_ == layers and draw(st.booleans()) else exit_,
        select=tuple(selects),
        layers=tuple(draw(st.permutations(pieces))),
        positions="compact" if compact else "persistent",
        mask=draw(st.sampled_from(["additive", "post_softmax"] if hides else ["additive"])),
    )
    return model(layers, visual), decisions


@given(any_decisions())
def test_refused_by_name_or_sound(case: tuple[ModelSpec, Decisions]) -> None:
    spec, decisions = case
    try:
        schedule = resolve(decisions, spec)
    except UserError as error:
        event("refused")
        named = r"(layer \d+: [a-z_.]+|encoder[a-z.]*|inject|exit|skip|positions|mask|layers): \S"
        assert re.match(named, str(error))
    else:
        event("resolved")
        check_sound(schedule, spec, decisions)


@given(good_decisions(), st.integers(1, 9))
def test_nothing_good_is_refused(case: tuple[ModelSpec, Decisions], text: int) -> None:
    spec, decisions = case
    schedule = resolve(decisions, spec)
    check_sound(schedule, spec, decisions)
    dense = resolve(Decisions(), spec)
    assert mac2(schedule, text) <= mac2(dense, text)
    assert macv(schedule) <= macv(dense)
    assert selection_flops(schedule, text) >= 0
    per_row = 2 * spec.kv_heads * spec.head_dim * 2
    for row, bytes_ in zip(schedule.rows, kv_bytes_per_layer(schedule, text, 2), strict=True):
        assert bytes_ == (per_row * (text + row.cached) if row.attends else 0)


def check_sound(schedule: Schedule, spec: ModelSpec, decisions: Decisions) -> None:
    """The invariants of the table."""
    assert [row.layer for row in schedule.rows] == list(range(spec.layers))
    for row in schedule.rows:
        inside = schedule.inject <= row.layer < schedule.exit
        before = schedule.live_before(row.layer)
        assert (row.live > 0) == inside
        assert row.after <= row.live <= before <= schedule.visual_tokens <= spec.visual_tokens
        assert row.after == (row.select.keep if row.select else before)
        assert row.live == (before if row.selects_inside else row.after)
        assert max(row.cached, row.queries, row.ffn_rows, row.skipped) <= row.live
        if inside and row.layer > schedule.inject:
            assert before == schedule.rows[row.layer - 1].after  # never grows after injection
            assert row.skipped >= schedule.rows[row.layer - 1].skipped
    assert tuple(row.select for row in schedule.stages) == decisions.select
    assert set(schedule.kv_groups) == {row.cached for row in schedule.rows if row.attends}
    assert len(set(schedule.kv_groups)) == len(schedule.kv_groups)
    assert 0 < schedule.mean_visual_tokens <= spec.visual_tokens


@given(good_decisions(), st.data())
def test_rules_compose_in_any_order(case: tuple[ModelSpec, Decisions], data: st.DataObject) -> None:
    """FastV + V-Skip and the like: field-wise union, whichever rule is said first."""
    spec, decisions = case
    shuffled = tuple(data.draw(st.permutations(decisions.layers)))
    mixed = msgspec.structs.replace(decisions, layers=shuffled + decisions.layers[:1])
    assert resolve(mixed, spec) == resolve(decisions, spec)


@given(good_decisions())
def test_a_profile_survives_yaml_and_json(case: tuple[ModelSpec, Decisions]) -> None:
    spec, decisions = case
    profile = Profile(name="any", method=Method(name="any"), model=spec, decisions=decisions)
    from_json = to_profile(msgspec.json.decode(msgspec.json.encode(profile)), source="json")
    from_yaml = to_profile(yaml.safe_load(yaml.safe_dump(msgspec.to_builtins(profile))), source="yaml")
    assert from_json == from_yaml == profile
    assert Schedule.resolve(from_yaml, spec) == resolve(decisions, spec)


@given(good_decisions(), st.data())
def test_hiding_more_never_costs_more(case: tuple[ModelSpec, Decisions], data: st.DataObject) -> None:
    spec, decisions = case
    before = resolve(decisions, spec)
    layer = data.draw(st.integers(0, spec.layers - 1))
    field = data.draw(st.sampled_from(["query", "ffn", "text_keys", "visual_keys", "cache"]))
    try:
        after = resolve(
            msgspec.structs.replace(decisions, layers=decisions.layers + rule(layer, **{field: "none"})), spec
        )
    except UserError:
        return
    assert mac2(after, 5) <= mac2(before, 5)
    assert sum(kv_bytes_per_layer(after, 5, 2)) <= sum(kv_bytes_per_layer(before, 5, 2))
    if field == "cache" and before.rows[layer].cached:
        assert mac2(after, 5) == mac2(before, 5)  # about decode only
