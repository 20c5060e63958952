"""Calibrators of encoder stages: published choices as numbers for a tower, refusals, composition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tiny_models import tiny_llava

from trimvlm.encoder_rules import HiPrune, MsvPrune, PruMerge, Tower, VisionZip, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec
from trimvlm.rules import RandomOrder
from trimvlm.schedule import resolve
from trimvlm_calib.calibrate import calibrate, read_parameters
from trimvlm_calib.methods import find
from trimvlm_calib.outcome import Outcome, merge

SPEC = ModelSpec(
    family="llava",
    layers=32,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=96,
    vocab=64,
    visual_tokens=576,
)
CLIP = Tower(layers=24, patches=576, cls=True, features=(23,), width=1024)

METHODS = ("msv-prune", "vispruner", "visionzip", "hiprune", "prumerge", "random-tokens")


def run(name: str, tower: Tower = CLIP, spec: ModelSpec = SPEC, **parameters: Any) -> Decisions:
    (method,) = find(name).values()
    probe: Any = SimpleNamespace(spec=spec, tower=tower)  # nothing else is asked for
    assert method.SAMPLES == 0
    decisions = method.calibrate(probe, read_parameters({name: method}, parameters)[name]).decisions
    resolve(decisions, spec)
    assert decisions == Decisions(encoder=decisions.encoder)
    return decisions


def test_on_clip_the_defaults_are_the_published_numbers() -> None:
    """Layers 0-based; hidden states as Hugging Face counts them. Budgets: SPIDER table 1, and the READMEs."""
    found = {name: run(name).encoder for name in METHODS}
    assert {name: stage.keep for name, stage in found.items() if stage} == {
        "msv-prune": 144,
        "vispruner": 128,
        "visionzip": 64,
        "hiprune": 192,
        "prumerge": 32,
        "random-tokens": 144,
    }
    assert {name: stage.by for name, stage in found.items() if stage} == {
        "msv-prune": MsvPrune(attention=22, middle=12, last=24),
        "vispruner": VisPruner(attention=22, features=23),
        "visionzip": VisionZip(contextual=10, attention=22, keys=22),
        "hiprune": HiPrune(object_layer=8, deep_layer=22),
        "prumerge": PruMerge(layer=23),
        "random-tokens": RandomOrder(seed=0),
    }


@pytest.mark.parametrize(
    ("keep", "rows", "merged"), [("128", 128, 20), (192, 192, 30), (0.5, 288, 45), (1, 576, 90)]
)
def test_budgets_are_shares_or_numbers(keep: Any, rows: int, merged: int) -> None:
    stage = run("visionzip", keep=keep).encoder
    assert stage and isinstance(stage.by, VisionZip)
    assert (stage.keep, stage.by.contextual) == (rows, merged)


@pytest.mark.parametrize("depth", range(1, 28))
@pytest.mark.parametrize("method", METHODS)
def test_every_tower_and_share_has_a_stage(method: str, depth: int) -> None:
    """Also the smallest: `decide` and the Schedule check what comes out."""
    tower = Tower(layers=depth, patches=49, cls=True, features=(max(0, depth - 1),), width=8)
    for share in (1, 0.5, 0.1, 0.02):
        run(method, tower, msgspec.structs.replace(SPEC, visual_tokens=49), keep=share)


def test_layers_and_shares_can_be_given() -> None:
    stage = run("msv-prune", keep=384, attention=20, middle=9, last=23, anchors=0.5, received="true").encoder
    assert stage and stage.by == MsvPrune(anchors=0.5, attention=20, received=True, middle=9, last=23)
    stage = run("prumerge", neighbours=1000).encoder
    assert stage and stage.by == PruMerge(neighbours=575, layer=23), "no more than there are others"
    stage = run("msv-prune", keep=4).encoder
    assert stage and stage.by == MsvPrune(clusters=2, attention=22, middle=12, last=24), "2 anchors, 2 others"


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("hiprune", {"keep": 577}, "keep: 577 is more than the 576 visual tokens"),
        ("hiprune", {"keep": 0}, r"keep: 0\.0 is neither a share"),
        ("hiprune", {"keep": 1.5}, r"keep: 1\.5 is neither a share"),
        ("hiprune", {"keep": "inf"}, "keep: inf is neither a share"),
        ("hiprune", {"object_layer": 24}, r"hiprune: attention layer 24 is not within the tower's 0\.\.23"),
        ("msv-prune", {"middle": 25}, r"msv_prune: hidden state 25 is not within the tower's 0\.\.24"),
        ("vispruner", {"important": 1.5}, r"important: 1\.5"),
        ("visionzip", {"contextual": 1}, r"contextual: 1\.0"),
        ("random-tokens", {"seed": -1}, "seed: -1 is negative"),
    ],
)
def test_refused(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(method, **parameters)


def test_a_tower_without_cls_takes_received_attention() -> None:
    bare = msgspec.structs.replace(CLIP, cls=False)
    for method in ("msv-prune", "vispruner"):
        with pytest.raises(UserError, match=r"\[CLS\].*received: true, or take hiprune or random"):
            run(method, bare)
        run(method, bare, received=True)
    for method in ("visionzip", "prumerge"):
        with pytest.raises(UserError, match=r"\[CLS\].*take msv_prune or vispruner with received: true"):
            run(method, bare)


def test_it_unites_with_what_the_decoder_does() -> None:
    skips = Outcome(decisions=Decisions(layers=(LayerRule(layers=(3, 4), query="none"),)))
    exits = Outcome(decisions=Decisions(exit=16))
    stage = Outcome(decisions=run("msv-prune"))
    united = merge({"msv-prune": stage, "v-skip": skips, "vtw": exits}).decisions
    schedule = resolve(united, SPEC)
    assert [row.live for row in schedule.rows] == [144] * 16 + [0] * 16
    assert schedule.rows[3].queries == 0 and schedule.rows[5].queries == 144
    with pytest.raises(UserError, match="encoder: the methods disagree"):
        merge({"msv-prune": stage, "hiprune": Outcome(decisions=run("hiprune"))})


def test_from_a_checkpoint(tmp_path: Any) -> None:
    """No sample is drawn and no model loaded; the tower's geometry comes from config.json."""
    checkpoint = tiny_llava(tmp_path / "model", vision_layers=6)
    profile = calibrate(checkpoint, "msv-prune", [], {"keep": 8}, data_name="none")
    assert profile.calibration is None
    assert profile.method.parameters["keep"] == 8
    stage = profile.decisions.encoder
    assert stage and stage.by == MsvPrune(clusters=3, attention=4, middle=3, last=6)
