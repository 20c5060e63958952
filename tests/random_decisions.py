"""Random valid decisions, with every field of a Schedule in them: `random_decisions(Random(0), model)`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
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
from trimvlm.schedule import resolve

Change = Callable[[Decisions, Random, ModelSpec], Decisions]


def random_decisions(random: Random, model: ModelSpec, changes: int = 7) -> Decisions:
    """Starts from the dense decoder and adds one thing after another; what the checks refuse is left out."""
    decisions = Decisions()
    for _ in range(changes):
        try:
            # The reference takes prompts that were reduced elsewhere, but not where it has to place them.
            found = random.choice(CHANGES[model.mrope :])(decisions, random, model)
            resolve(found, model)
        except UserError:
            continue
        decisions = found
    return decisions


def _set(decisions: Decisions, **fields: object) -> Decisions:
    return msgspec.structs.replace(decisions, **fields)


def _encoder(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    keep = random.randint(1, model.visual_tokens)
    return _set(decisions, encoder=EncoderStage(keep=keep, by=RandomOrder()))


def _inject(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    return _set(decisions, inject=random.randrange(model.layers - 1))


def _exit(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    return _set(decisions, exit=random.randint(2, model.layers))


def _compact(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    return _set(decisions, positions="compact")


def _select(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    live = resolve(decisions, model).visual_tokens
    keep = random.randint(1, live)
    select = Select(layer=random.randrange(model.layers), keep=keep, by=_rule(random))
    return _set(decisions, select=(*decisions.select, select))


def _rule(random: Random) -> SelectionRule:
    threshold = random.choice([None, 0.0, 0.05, 0.2, 0.5])
    return random.choice(
        [
            LastRowAttention(attention="previous"),
            LastRowAttention(attention="own"),
            TextAttention(),
            ValueInfluence(),
            ValueInfluence(threshold=threshold),
            ValueInfluence(threshold=threshold),
            CrossAndSelfAttention(),
            RandomOrder(seed=random.randrange(5)),
            RouterScores(),
        ]
    )


def _skip(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    layers = sorted(random.sample(range(model.layers), random.randint(1, 2)))
    counts = sorted(random.randint(1, model.visual_tokens) for _ in layers)
    stages = tuple(SkipStage(layer=layer, count=n) for layer, n in zip(layers, counts, strict=True))
    entropy = random.random() < 0.7
    mode = SkipMode(stages=stages, entropy=entropy, correlation=not entropy or random.random() < 0.7)
    later = [layer for layer in range(layers[0], model.layers) if random.random() < 0.7]
    fields = {random.choice(["query", "ffn"]): "unskipped", random.choice(["query", "ffn"]): "unskipped"}
    rule = msgspec.convert({"layers": later, **fields}, LayerRule)
    return _set(decisions, skip=mode, layers=(*decisions.layers, rule))


def _layer(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    layers = tuple(random.sample(range(model.layers), random.randint(1, 2)))
    field, values = random.choice(
        [
            ("query", ["none"]),
            ("ffn", ["none"]),
            ("text_keys", ["none"]),
            ("visual_keys", ["none"]),
            ("cache", ["none"]),
            ("execute", ["decode", "none"]),
            ("sublayers", ["attention", "ffn"]),
        ]
    )
    rule = msgspec.convert({"layers": layers, field: random.choice(values)}, LayerRule)
    return _set(decisions, layers=(*decisions.layers, rule))


def _post_softmax(decisions: Decisions, random: Random, model: ModelSpec) -> Decisions:
    layers = tuple(random.sample(range(model.layers), random.randint(1, 2)))
    keys = random.choice([{"text_keys": "sink"}, {"text_keys": "none"}, {"visual_keys": "none"}])
    rule = msgspec.convert({"layers": layers, **keys}, LayerRule)
    return _set(decisions, mask="post_softmax", layers=(*decisions.layers, rule))


CHANGES: list[Change] = [
    _encoder,
    _inject,
    _exit,
    _compact,
    *[_select] * 4,
    *[_skip] * 2,
    *[_layer] * 6,
    *[_post_softmax] * 2,
]
