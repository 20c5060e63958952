"""The exported decoder computes what the reference computes: two implementations, one Schedule.

Random valid Schedules, with every field of the Schedule in them, on random tiny models.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import Schedule, resolve
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.reference import Reference
from trimvlm_export.source import Source

LAYERS, TOLERANCE = 5, 2e-5


@pytest.fixture(scope="module", params=["mha", "gqa-bias-tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "mha":
        return tiny_llava(path, layers=LAYERS)
    return tiny_llava(path, layers=LAYERS, kv_heads=2, attention_bias=True, tie=True, seed=1)


@cache
def loaded(checkpoint: Path) -> tuple[LlavaForConditionalGeneration, ModelSpec, Source]:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    source = Source.place(checkpoint, checkpoint.parent / f"{checkpoint.name}-bundle", "float32")
    return model, model_spec(checkpoint), source


@st.composite
def decisions(draw: st.DrawFn, visual: int = 16) -> Decisions:
    """Any decisions at all; the validator's refusals are drawn again."""
    positions = draw(st.sampled_from(["persistent", "persistent", "compact"]))
    inject = draw(st.integers(0, 2)) if positions == "persistent" else 0
    exit_ = draw(st.one_of(st.none(), st.integers(inject + 1, LAYERS)))
    layers = range(inject, LAYERS if exit_ is None else exit_)
    picked = sorted(draw(st.sets(st.sampled_from(list(layers)), max_size=2)))
    selects, live = [], visual
    for layer in picked:
        live = draw(st.integers(1, live))
        by = LastRowAttention(attention=draw(st.sampled_from(["own", "previous"])))
        selects.append(Select(layer=layer, keep=live, by=by))
    rules = []
    for field in ("query", "ffn", "text_keys", "visual_keys", "cache", "execute"):
        chosen = draw(st.sets(st.sampled_from(list(layers)), max_size=2))
        if chosen and draw(st.booleans()):
            rules.append(LayerRule(layers=tuple(sorted(chosen)), **{field: "none"}))
    hides = any(rule.text_keys or rule.visual_keys for rule in rules)
    mask = draw(st.sampled_from(["additive", "post_softmax"])) if hides else "additive"
    found = Decisions(
        inject=inject, exit=exit_, select=tuple(selects), layers=tuple(rules), positions=positions, mask=mask
    )
    try:
        resolve(found, _SPEC)
    except UserError:
        reject()
    return found


_SPEC = ModelSpec(
    family="llava",
    layers=LAYERS,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=96,
    vocab=64,
    visual_tokens=16,
)


def feed(schedule: Schedule, inputs: dict[str, Any], visual: torch.Tensor) -> dict[str, Any]:
    """Decoder arguments for a prefill."""
    ids = inputs["input_ids"][0]
    places, is_image = torch.arange(len(ids)), ids == 4
    executed = [row for row in schedule.rows if row.execute == "both"]
    empty = torch.zeros(1, schedule.model.kv_heads, 0, schedule.model.head_dim)
    return {
        "input_ids": ids[~is_image],
        "visual": visual,
        "text_positions": places[~is_image],
        "visual_positions": places[is_image],
        "forced": [torch.zeros(0, dtype=torch.long) for _ in schedule.stages],
        "past_key": [empty for _ in executed],
        "past_value": [empty for _ in executed],
    }


def close(ours: Any, reference: Any) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE * max(1.0, np.abs(reference).max()))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=decisions(), images=st.integers(1, 2), seed=st.integers(0, 3))
def test_decoder_equals_reference(checkpoint: Path, choices: Decisions, images: int, seed: int) -> None:
    model, spec, source = loaded(checkpoint)
    schedule = resolve(choices, spec)
    decoder = make_decoder(source.config, schedule)
    source.load(decoder, decoder_names(source.family, source.config, decoder))
    inputs = tiny_inputs(checkpoint, images=images, seed=seed)
    with Reference(model, schedule) as reference, torch.no_grad():
        visual = reference.features(inputs)
        expected = reference.prefill(inputs, features=visual)
        given_ = feed(schedule, inputs, visual)
        logits, keys, values, selected, scores = decoder(**given_)
        for ours, theirs in zip(selected, expected.selected, strict=True):
            assert ours.tolist() == theirs.tolist()
        for ours, theirs in zip(scores, expected.scores, strict=True):
            close(ours, theirs)
        close(logits[0], expected.logits)
        kv = [pair for pair in expected.kv if pair is not None]
        for ours, theirs in zip(zip(keys, values, strict=True), kv, strict=True):
            close(ours[0], theirs[0])
            close(ours[1], theirs[1])
        # The cache alone must be enough to go on.
        for step, token in enumerate((7, 30)):
            logits, keys, values, _, _ = decoder(
                **{
                    **given_,
                    "input_ids": torch.tensor([token]),
                    "visual": visual[:0],
                    "text_positions": torch.tensor([inputs["input_ids"].shape[1] + step]),
                    "visual_positions": torch.zeros(0, dtype=torch.long),
                    "past_key": keys,
                    "past_value": values,
                }
            )
            close(logits[0], reference.step(token))


def test_forced_indices_replace_the_selection(checkpoint: Path) -> None:
    model, spec, source = loaded(checkpoint)
    own = LastRowAttention(attention="own")
    schedule = resolve(
        Decisions(select=(Select(layer=1, keep=5, by=own), Select(layer=3, keep=2, by=own))), spec
    )
    decoder = make_decoder(source.config, schedule)
    source.load(decoder, decoder_names(source.family, source.config, decoder))
    inputs = tiny_inputs(checkpoint)
    forced = [np.array([0, 3, 4, 9, 15]), np.array([3, 15])]
    with Reference(model, schedule) as reference, torch.no_grad():
        visual = reference.features(inputs)
        free, expected = reference.prefill(inputs), reference.prefill(inputs, forced=forced)
        given_ = feed(schedule, inputs, visual) | {"forced": [torch.from_numpy(f) for f in forced]}
        logits, _, _, selected, scores = decoder(**given_)
    assert [s.tolist() for s in selected] == [f.tolist() for f in forced]
    assert [s.tolist() for s in free.selected] != [f.tolist() for f in forced]
    close(logits[0], expected.logits)
    close(scores[1], expected.scores[1])


def test_unknown_activation_is_refused(checkpoint: Path) -> None:
    _, spec, source = loaded(checkpoint)
    other = type(source.config).from_dict(source.config.to_dict())
    other.text_config.hidden_act = "gelu"
    with pytest.raises(UserError, match=r"hidden_act.*gelu.*silu"):
        make_decoder(other, resolve(Decisions(), spec))
