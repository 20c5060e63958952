"""One profile per method for a model that is only measured: the papers' decisions, scaled to its depth.

Time depends on how many layers of each kind there are, hardly on which ones a calibration would choose.
Depths and budgets are the published ones for 32 layers and 576 visual tokens, 0-based.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from trimvlm.accounting import mac2, selection_flops
from trimvlm.encoder_rules import EncoderStage, MsvPrune, Tower
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method, ModelSpec, Profile, Select, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, ValueInfluence
from trimvlm.schedule import resolve

DENSE = "dense"
QUARTER = ("spider-25", "hidivdrop-25", "visipruner-25")  # about a quarter of the dense FLOPs
_PAPER_LAYERS, _PAPER_TOKENS = 32, 576
_SKIPPED = 19  # V-Skip and ShortV, LLaVA-1.5-7B
_SPIDER_TOKENS, _SPIDER_SKIPPED = 384, 0.55
_HIDIVDROP_BUDGETS = (215, 10, 5, 1)  # 64 tokens on average; official script
_VISIPRUNER_FILTER, _VISIPRUNER_EXIT = 15, 24  # what the published FLOPs imply; published average
_VISIPRUNER_SHALLOW, _VISIPRUNER_TOKENS = 6, 20

Maker = Callable[[ModelSpec, Tower, int], Decisions]  # model, tower, text rows of the prompt


def bench_profiles(model: ModelSpec, tower: Tower, text: int) -> dict[str, Profile]:
    """Method name to Profile, `dense` first. The model needs at least 8 layers.

    Args:
        model: its `visual_tokens` are what budgets are shares of.
        text: text rows of the prompt for which a quarter of the FLOPs is meant.
    """
    return {
        name: Profile(
            name=name,
            method=Method(name=name),
            model=model,
            decisions=make(model, tower, text),
            needs_adapted_weights=name.startswith("hidivdrop"),
            notes="static decisions for measuring time; nothing was calibrated",
        )
        for name, make in METHODS.items()
    }


def spider(model: ModelSpec, tower: Tower, keep: int | None = None, *, entropy: bool = True) -> Decisions:
    """MSV-Prune to two thirds of the tokens; from the middle on 55 % of those bypass each layer's attention,
    in one layer of eight the FFN instead (table 9).

    Args:
        keep: tokens, instead of two thirds; each view of the tower keeps the same number.
        entropy: also rank by the LM head's entropy, as published.
    """
    wanted = keep or round(_SPIDER_TOKENS * model.visual_tokens / _PAPER_TOKENS)
    keep = max(1, wanted // tower.views) * tower.views
    anchors, each, half = 0.7, keep // tower.views, model.layers // 2
    stage = MsvPrune(
        anchors=anchors,
        clusters=min(4, each - int(each * anchors)),
        attention=tower.layers - 2,
        received=not (tower.cls or tower.hidden_cls),
        middle=tower.layers // 2,
        last=tower.layers,
    )
    feed_forward = tuple(range(model.layers - max(1, half // 8), model.layers))
    skipped = max(1, round(keep * _SPIDER_SKIPPED))
    return Decisions(
        encoder=EncoderStage(keep=keep, by=stage),
        skip=SkipMode(stages=(SkipStage(layer=half, count=skipped),), entropy=entropy),
        layers=(
            LayerRule(layers=tuple(range(half, feed_forward[0])), query="unskipped"),
            LayerRule(layers=feed_forward, ffn="unskipped"),
        ),
    )


def hidivdrop(layers: int, tokens: int, first: int | None = None) -> Decisions:
    """Injection at L/4, exit at 3L/4, filters after the injection layer.

    A decoder of few layers has no room for all four filters between injection and exit; the first ones, with
    the larger budgets, are kept.

    Args:
        first: tokens that the first filter keeps, instead of the published share.
    """
    inject, leave = layers // 4, 3 * layers // 4
    own = LastRowAttention(attention="own")
    # The official script's filters sit at layers 10, 14, 16, 18 of 32; no two may fall on one layer here.
    wanted = [round(layer * layers / _PAPER_LAYERS) for layer in (10, 14, 16, 18)]
    budgets = [max(1, round(budget * tokens / _PAPER_TOKENS)) for budget in _HIDIVDROP_BUDGETS]
    if first is not None:
        budgets = [first, *(min(first, budget) for budget in budgets[1:])]
    stages: list[Select] = []
    for layer, budget in zip(wanted, budgets, strict=True):
        free = max(layer, stages[-1].layer + 1 if stages else inject + 1)
        if free < leave:
            stages.append(Select(layer=free, keep=budget, by=own))
    return Decisions(inject=inject, exit=leave, select=tuple(stages))


def visipruner(layers: int, tokens: int, filter_layer: int | None = None) -> Decisions:
    """Vision-blind shallow layers, a filter by value influence, an exit.

    Args:
        filter_layer: the layer with few tokens, instead of the published share of the depth.
    """
    shallow = shallow_layers(layers)
    chosen = filter_layer or max(shallow + 1, layers * _VISIPRUNER_FILTER // _PAPER_LAYERS)
    keep = max(1, round(_VISIPRUNER_TOKENS * tokens / _PAPER_TOKENS))
    rules = [LayerRule(layers=(0,), text_keys="sink", visual_keys="none")]
    if shallow > 1:
        rules.append(LayerRule(layers=tuple(range(1, shallow)), text_keys="none"))
    return Decisions(
        mask="post_softmax",
        exit=exit_layer(layers),
        select=(Select(layer=chosen, keep=keep, by=ValueInfluence(threshold=0.0)),),
        layers=tuple(rules),
    )


def shallow_layers(layers: int) -> int:
    """Layers that VisiPruner makes blind."""
    return max(1, round(layers * _VISIPRUNER_SHALLOW / _PAPER_LAYERS))


def exit_layer(layers: int) -> int:
    """Where VisiPruner's visual tokens leave."""
    return layers * _VISIPRUNER_EXIT // _PAPER_LAYERS


def nearest_quarter(candidates: Iterable[Decisions], model: ModelSpec, text: int) -> Decisions:
    """The candidate whose prefill takes nearest to a quarter of the dense FLOPs, of those that this model
    can have."""
    dense = mac2(resolve(Decisions(), model), text)

    def distance(decisions: Decisions) -> float:
        try:
            schedule = resolve(decisions, model)
        except UserError:
            return float("inf")
        return abs((mac2(schedule, text) + selection_flops(schedule, text)) / dense - 0.25)

    return min(candidates, key=distance)


def _late(model: ModelSpec) -> tuple[int, ...]:
    return tuple(range(model.layers - round(model.layers * _SKIPPED / _PAPER_LAYERS), model.layers))


def _v_skip(model: ModelSpec) -> LayerRule:
    return LayerRule(layers=_late(model), query="none")


def _fastv(model: ModelSpec) -> Select:
    return Select(layer=2, keep=model.visual_tokens // 2, by=LastRowAttention(attention="previous"))


def _tokens(model: ModelSpec, step: int = 1) -> range:
    """Budgets to choose from, some 64 of them."""
    stride = step * max(1, model.visual_tokens // (64 * step))
    return range(stride, model.visual_tokens + 1, stride)


METHODS: dict[str, Maker] = {
    DENSE: lambda model, tower, text: Decisions(),
    "v-skip": lambda model, tower, text: Decisions(layers=(_v_skip(model),)),
    "fastv": lambda model, tower, text: Decisions(select=(_fastv(model),)),
    "vtw": lambda model, tower, text: Decisions(exit=model.layers // 2),
    "shortv": lambda model, tower, text: Decisions(
        layers=(LayerRule(layers=_late(model), query="none", ffn="none"),)
    ),
    "fastv+v-skip": lambda model, tower, text: Decisions(select=(_fastv(model),), layers=(_v_skip(model),)),
    "spider": lambda model, tower, text: spider(model, tower),
    "hidivdrop": lambda model, tower, text: hidivdrop(model.layers, model.visual_tokens),
    "visipruner": lambda model, tower, text: visipruner(model.layers, model.visual_tokens),
    "spider-25": lambda model, tower, text: nearest_quarter(
        [spider(model, tower, keep, entropy=False) for keep in _tokens(model, tower.views)], model, text
    ),
    "hidivdrop-25": lambda model, tower, text: nearest_quarter(
        [hidivdrop(model.layers, model.visual_tokens, first) for first in _tokens(model)], model, text
    ),
    "visipruner-25": lambda model, tower, text: nearest_quarter(
        [
            visipruner(model.layers, model.visual_tokens, layer)
            for layer in range(shallow_layers(model.layers) + 1, exit_layer(model.layers))
        ],
        model,
        text,
    ),
}
