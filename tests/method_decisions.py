"""What every method decides, for tiny models: an entry for each kind of decision that a shipped method makes.

`METHODS` are the seven of the demo, `MORE` all others but the router, which needs weights.
"""

from __future__ import annotations

from trimvlm.encoder_rules import EncoderStage, HiPrune, MsvPrune, PruMerge, VisionZip, VisPruner
from trimvlm.profile import Decisions, LayerRule, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    TextAttention,
    ValueInfluence,
)

LAYERS, TOKENS = 5, 16

_LATE = LayerRule(layers=(3, 4), query="none")
_FASTV = Select(layer=2, keep=TOKENS // 2, by=LastRowAttention(attention="previous"))
_OWN = LastRowAttention(attention="own")

METHODS = {
    "dense": Decisions(),
    "v-skip": Decisions(layers=(_LATE,)),
    "fastv": Decisions(select=(_FASTV,)),
    "vtw": Decisions(exit=3),
    "shortv": Decisions(layers=(LayerRule(layers=(3, 4), query="none", ffn="none"),)),
    "hidivdrop": Decisions(
        inject=1, exit=4, select=(Select(layer=2, keep=8, by=_OWN), Select(layer=3, keep=3, by=_OWN))
    ),
    "fastv+v-skip": Decisions(select=(_FASTV,), layers=(_LATE,)),
}


_MSV = EncoderStage(keep=10, by=MsvPrune(attention=1, middle=1, last=2, clusters=2))
_SKIPPING = SkipMode(stages=(SkipStage(layer=1, count=2), SkipStage(layer=2, count=5)))
_TARGETS = (LayerRule(layers=(1, 3), query="unskipped"), LayerRule(layers=(2, 4), ffn="unskipped"))
_V_SKIP = LayerRule(layers=(2, 3), query="none")


def _select(by: object, *layer_keep: tuple[int, int]) -> tuple[Select, ...]:
    return tuple(Select(layer=layer, keep=keep, by=by) for layer, keep in layer_keep)  # type: ignore[arg-type]


# As the calibrators decide, for five layers and 16 visual tokens.
MORE = {
    "asl-skip": Decisions(skip=_SKIPPING, layers=_TARGETS),
    "visipruner": Decisions(
        mask="post_softmax",
        exit=4,
        select=_select(ValueInfluence(threshold=0.01), (3, 4)),
        layers=(
            LayerRule(layers=(0,), text_keys="sink", visual_keys="none"),
            LayerRule(layers=(1,), text_keys="none"),
        ),
    ),
    "visipruner-additive": Decisions(
        select=_select(ValueInfluence(), (3, 4)), layers=(LayerRule(layers=(0, 1), text_keys="none"),)
    ),
    "pyramiddrop": Decisions(positions="compact", select=_select(_OWN, (1, 8), (2, 4), (4, 2))),
    "sparsevlm": Decisions(select=_select(TextAttention(), (1, 8), (2, 5))),
    "fitprune": Decisions(select=_select(CrossAndSelfAttention(), (1, 12), (2, 8), (3, 3))),
    "random-layers": Decisions(layers=(LayerRule(layers=(2,), execute="none"),)),
    "shortgpt": Decisions(layers=(LayerRule(layers=(3,), execute="none"),)),
    "shortgpt-generation": Decisions(layers=(LayerRule(layers=(3,), execute="decode"),)),
    "magnitude": Decisions(
        layers=(LayerRule(layers=(1,), sublayers="ffn"), LayerRule(layers=(3,), sublayers="attention"))
    ),
    "random-select": Decisions(select=_select(RandomOrder(seed=3), (0, 8))),
    "msv-prune": Decisions(encoder=_MSV),
    "msv-prune+asl-skip": Decisions(encoder=_MSV, skip=_SKIPPING, layers=_TARGETS),
    "msv-prune+v-skip+vtw": Decisions(encoder=_MSV, exit=4, layers=(_V_SKIP,)),
    "vispruner": Decisions(encoder=EncoderStage(keep=8, by=VisPruner(attention=1, features=1))),
    "visionzip": Decisions(encoder=EncoderStage(keep=8, by=VisionZip(contextual=2, attention=1, keys=1))),
    "hiprune": Decisions(encoder=EncoderStage(keep=8, by=HiPrune(object_layer=0, deep_layer=1))),
    "prumerge": Decisions(encoder=EncoderStage(keep=8, by=PruMerge(neighbours=4, layer=1))),
    "random-tokens": Decisions(encoder=EncoderStage(keep=8, by=RandomOrder())),
}
