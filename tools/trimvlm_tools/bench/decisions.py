"""One profile per method for a model that is only measured: the papers' decisions, scaled to its depth.

Time depends on how many layers of each kind there are, hardly on which ones a calibration would choose.
Depths and budgets are the published ones for 32 layers and 576 visual tokens, 0-based.
"""

from __future__ import annotations

from trimvlm.profile import Decisions, LayerRule, Method, ModelSpec, Profile, Select
from trimvlm.rules import LastRowAttention

_PAPER_LAYERS, _PAPER_TOKENS = 32, 576
_SKIPPED = 19  # V-Skip and ShortV, LLaVA-1.5-7B
_HIDIVDROP_BUDGETS = (215, 10, 5, 1)  # 64 tokens on average; official script


def bench_profiles(model: ModelSpec) -> dict[str, Profile]:
    """Method name to Profile, `dense` first. The model needs at least 6 layers."""
    return {
        name: Profile(
            name=name,
            method=Method(name=name),
            model=model,
            decisions=decisions,
            needs_adapted_weights=name == "hidivdrop",
            notes="static decisions for measuring time; nothing was calibrated",
        )
        for name, decisions in method_decisions(model.layers, model.visual_tokens).items()
    }


def method_decisions(layers: int, tokens: int) -> dict[str, Decisions]:
    """Decisions of every method for `layers` decoder layers and `tokens` visual tokens."""
    skipped = round(layers * _SKIPPED / _PAPER_LAYERS)
    late = tuple(range(layers - skipped, layers))
    fastv = Select(layer=2, keep=tokens // 2, by=LastRowAttention(attention="previous"))
    no_query = LayerRule(layers=late, query="none")
    return {
        "dense": Decisions(),
        "v-skip": Decisions(layers=(no_query,)),
        "fastv": Decisions(select=(fastv,)),
        "vtw": Decisions(exit=layers // 2),
        "shortv": Decisions(layers=(LayerRule(layers=late, query="none", ffn="none"),)),
        "hidivdrop": hidivdrop(layers, tokens),
        "fastv+v-skip": Decisions(select=(fastv,), layers=(no_query,)),
    }


def hidivdrop(layers: int, tokens: int) -> Decisions:
    """Injection at L/4, exit at 3L/4, filters after the injection layer.

    A decoder of few layers has no room for all four filters between injection and exit; the first ones, with
    the larger budgets, are kept.
    """
    inject, leave = layers // 4, 3 * layers // 4
    own = LastRowAttention(attention="own")
    # The official script's filters sit at layers 10, 14, 16, 18 of 32; no two may fall on one layer here.
    wanted = [round(layer * layers / _PAPER_LAYERS) for layer in (10, 14, 16, 18)]
    stages: list[Select] = []
    for layer, budget in zip(wanted, _HIDIVDROP_BUDGETS, strict=True):
        free = max(layer, stages[-1].layer + 1 if stages else inject + 1)
        if free < leave:
            stages.append(Select(layer=free, keep=max(1, round(budget * tokens / _PAPER_TOKENS)), by=own))
    return Decisions(inject=inject, exit=leave, select=tuple(stages))
