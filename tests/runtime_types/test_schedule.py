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
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method, ModelSpec, Profile, Select, to_profile
from trimvlm.rules import LastRowAttention
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


def keep(layer: int, count: int, by: LastRowAttention = OWN) -> tuple[Select, ...]:
    return (Select(layer=layer, keep=count, by=by),)


HIDE = rule(2, text_keys="none")


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


@st.composite
def any_decisions(draw: st.DrawFn) -> tuple[ModelSpec, Decisions]:
    """Decisions of all kinds, most of them near the edge of what can be."""
    layers, visual = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    layer = st.integers(0, layers - 1)
    sides = st.sampled_from([None, None, "live", "none"])
    rules = st.builds(
        LayerRule,
        layers=st.lists(layer, min_size=1, max_size=3, unique=True).map(tuple),
        query=sides,
        text_keys=sides,
        visual_keys=sides,
        ffn=sides,
        cache=sides,
        execute=st.sampled_from([None, None, None, "both", "none"]),
    )
    selects = st.builds(
        Select, layer=layer, keep=st.integers(1, visual), by=st.sampled_from([OWN, OWN, PREVIOUS])
    )
    decisions = Decisions(
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
        skipped = draw(st.integers(0, 4)) == 0
        fields.append({"execute": "none"} if skipped else dict.fromkeys(sorted(hidden), "none"))
    sees = ["execute" not in said and "text_keys" not in said for said in fields]
    selects: list[Select] = []
    live = visual
    for layer in range(inject, exit_):
        ways = [OWN] * sees[layer] + [PREVIOUS] * (layer > inject and sees[layer - 1])
        if ways and draw(st.booleans()):
            live = draw(st.integers(1, live))
            selects.append(Select(layer=layer, keep=live, by=draw(st.sampled_from(ways))))
    hides = any({"text_keys", "visual_keys"} & said.keys() for said in fields)
    pieces = [
        LayerRule(layers=(layer,), **{field: value})
        for layer, said in enumerate(fields)
        for field, value in said.items()
    ]
    decisions = Decisions(
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
        assert re.match(r"(layer \d+: [a-z_.]+|inject|exit|positions|mask|layers): \S", str(error))
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
        assert bytes_ == (per_row * (text + row.cached) if row.execute == "both" else 0)


def check_sound(schedule: Schedule, spec: ModelSpec, decisions: Decisions) -> None:
    """The invariants of the table."""
    assert [row.layer for row in schedule.rows] == list(range(spec.layers))
    for row in schedule.rows:
        inside = schedule.inject <= row.layer < schedule.exit
        before = schedule.live_before(row.layer)
        assert (row.live > 0) == inside
        assert row.live <= before <= spec.visual_tokens
        assert row.live == (row.select.keep if row.select else before)
        assert max(row.cached, row.queries, row.ffn_rows) <= row.live
        if inside and row.layer > schedule.inject:
            assert before == schedule.rows[row.layer - 1].live  # never grows after injection
    assert tuple(row.select for row in schedule.stages) == decisions.select
    assert set(schedule.kv_groups) == {row.cached for row in schedule.rows if row.execute == "both"}
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
