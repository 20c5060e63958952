"""Plans of every kind of decision, for every generation of cards that TensorRT-RTX builds for here."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_bundle

from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, HiPrune, MsvPrune, PruMerge, VisionZip, VisPruner
from trimvlm.profile import Decisions, LayerRule, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    TextAttention,
    ValueInfluence,
)
from trimvlm_engines.build import build

pytest.importorskip("tensorrt_rtx")

CARDS = {"rtx-3090": "8.6", "rtx-4090": "8.9", "rtx-5090": "12.0"}
LAYERS = 5
OWN = LastRowAttention(attention="own")
MSV = EncoderStage(keep=10, by=MsvPrune(attention=1, middle=1, last=2, clusters=2))
SKIPPING = SkipMode(stages=(SkipStage(layer=1, count=2), SkipStage(layer=2, count=5)))
TARGETS = (LayerRule(layers=(1, 3), query="unskipped"), LayerRule(layers=(2, 4), ffn="unskipped"))
V_SKIP = LayerRule(layers=(2, 3), query="none")


def select(by: object, *layer_keep: tuple[int, int]) -> tuple[Select, ...]:
    return tuple(Select(layer=layer, keep=keep, by=by) for layer, keep in layer_keep)  # type: ignore[arg-type]


# As the calibrators decide, for five layers and 16 visual tokens.
DECISIONS = {
    "asl-skip": Decisions(skip=SKIPPING, layers=TARGETS),
    "visipruner": Decisions(
        mask="post_softmax",
        exit=4,
        select=select(ValueInfluence(threshold=0.01), (3, 4)),
        layers=(
            LayerRule(layers=(0,), text_keys="sink", visual_keys="none"),
            LayerRule(layers=(1,), text_keys="none"),
        ),
    ),
    "visipruner-additive": Decisions(
        select=select(ValueInfluence(), (3, 4)), layers=(LayerRule(layers=(0, 1), text_keys="none"),)
    ),
    "pyramiddrop": Decisions(positions="compact", select=select(OWN, (1, 8), (2, 4), (4, 2))),
    "sparsevlm": Decisions(select=select(TextAttention(), (1, 8), (2, 5))),
    "fitprune": Decisions(select=select(CrossAndSelfAttention(), (1, 12), (2, 8), (3, 3))),
    "shortgpt": Decisions(layers=(LayerRule(layers=(3,), execute="none"),)),
    "shortgpt-generation": Decisions(layers=(LayerRule(layers=(3,), execute="decode"),)),
    "magnitude": Decisions(
        layers=(LayerRule(layers=(1,), sublayers="ffn"), LayerRule(layers=(3,), sublayers="attention"))
    ),
    "random-select": Decisions(select=select(RandomOrder(seed=3), (0, 8))),
    "msv-prune": Decisions(encoder=MSV),
    "msv-prune+asl-skip": Decisions(encoder=MSV, skip=SKIPPING, layers=TARGETS),
    "msv-prune+v-skip+vtw": Decisions(encoder=MSV, exit=4, layers=(V_SKIP,)),
    "vispruner": Decisions(encoder=EncoderStage(keep=8, by=VisPruner(attention=1, features=1))),
    "visionzip": Decisions(encoder=EncoderStage(keep=8, by=VisionZip(contextual=2, attention=1, keys=1))),
    "hiprune": Decisions(encoder=EncoderStage(keep=8, by=HiPrune(object_layer=0, deep_layer=1))),
    "prumerge": Decisions(encoder=EncoderStage(keep=8, by=PruMerge(neighbours=4, layer=1))),
    "random-tokens": Decisions(encoder=EncoderStage(keep=8, by=RandomOrder())),
}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all of them, float32."""
    return tiny_bundle(tmp_path_factory.mktemp("every"), DECISIONS, layers=LAYERS)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", DECISIONS)
def test_builds(every: Path, name: str, card: str) -> None:
    engine = build(every, card, name)
    assert engine.options["decoder"]["compute_capability"] == CARDS[card]
    roles = {"vision", "decoder"} | ({"projector"} if DECISIONS[name].encoder else set())
    assert set(engine.graphs) == roles
    for role, file in engine.graphs.items():
        assert Bundle(every).path(file).stat().st_size == engine.measured[f"{role}_bytes"]
