"""The exported decoder as a whole: forced indices, what is left out, and what a run costs.

That it computes what the reference computes is `test_random_schedules.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_llava
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import CrossAndSelfAttention, LastRowAttention, RandomOrder, ValueInfluence
from trimvlm.schedule import Schedule, resolve
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder import Decoder
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.decoder_run import Outputs
from trimvlm_export.graph_io import attending
from trimvlm_export.reference import Reference
from trimvlm_export.source import Source

LAYERS, IMAGE = 5, 4
PROMPT = [1, 5, *[IMAGE] * 16, 7, 8, 9]
OWN, INFLUENCE = LastRowAttention(attention="own"), ValueInfluence()


@pytest.fixture(scope="module", params=["mha", "gqa-bias-tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "mha":
        return tiny_llava(path, layers=LAYERS)
    return tiny_llava(path, layers=LAYERS, kv_heads=2, attention_bias=True, tie=True, seed=1)


@cache
def loaded(checkpoint: Path) -> tuple[ModelSpec, Source]:
    return model_spec(checkpoint), Source.place(
        checkpoint, checkpoint.parent / f"{checkpoint.name}-bundle", "float32"
    )


def decoder_of(checkpoint: Path, decisions: Decisions) -> Decoder:
    spec, source = loaded(checkpoint)
    decoder = make_decoder(source.config, resolve(decisions, spec))
    source.load(decoder, decoder_names(source.family, source.config, decoder))
    return decoder


def feed(schedule: Schedule, ids: list[int], visual: torch.Tensor) -> dict[str, Any]:
    """Decoder arguments for a prefill."""
    places, is_image = torch.arange(len(ids)), torch.tensor(ids) == IMAGE
    none = torch.zeros(0, dtype=torch.long)
    empty = torch.zeros(1, schedule.model.kv_heads, 0, schedule.model.head_dim)
    return {
        "input_ids": torch.tensor(ids)[~is_image],
        "visual": visual,
        "text_positions": places[~is_image],
        "visual_positions": places[is_image],
        "forced": [none for _ in schedule.stages],
        "forced_skip": [none for _ in schedule.skip_stages],
        "past_key": [empty for _ in attending(schedule)],
        "past_value": [empty for _ in attending(schedule)],
        "past_visible": [none.bool() for _ in schedule.masks],
    }


def rows(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answers(decoder: Decoder, ids: list[int], visual: torch.Tensor, steps: tuple[int, ...] = (7, 30)) -> list:
    """Logits of the prefill and of decode steps."""
    given = feed(decoder.schedule, ids, visual)
    out: Outputs = decoder(**given)
    found = [out.logits]
    for step, token in enumerate(steps):
        given |= {
            "input_ids": torch.tensor([token]),
            "visual": visual[:0],
            "text_positions": torch.tensor([len(ids) + step]),
            "visual_positions": torch.zeros(0, dtype=torch.long),
            "past_key": out.present_key,
            "past_value": out.present_value,
            "past_visible": out.present_visible,
        }
        out = decoder(**given)
        found.append(out.logits)
    return found


def same(ours: list, theirs: list) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_forced_indices_replace_the_selection(checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    decoder = decoder_of(
        checkpoint,
        Decisions(
            select=(Select(layer=1, keep=9, by=OWN), Select(layer=2, keep=5, by=OWN)),
            skip=SkipMode(stages=(SkipStage(layer=3, count=2), SkipStage(layer=4, count=3))),
            layers=(LayerRule(layers=(3, 4), query="unskipped"),),
        ),
    )
    inputs = tiny_inputs(checkpoint)
    forced = [np.array([0, 2, 3, 4, 5, 9, 11, 14, 15]), np.array([0, 3, 4, 9, 15])]
    skipped = [np.array([0, 9]), np.array([3, 4, 15])]  # the rows of the first stage need not stay
    with Reference(model, decoder.schedule) as reference, torch.no_grad():
        visual = reference.features(inputs)
        free = reference.prefill(inputs)
        expected = reference.prefill(inputs, forced=forced, forced_skip=skipped)
        given = feed(decoder.schedule, inputs["input_ids"][0].tolist(), visual)
        given |= {"forced": [torch.from_numpy(f) for f in forced]}
        given |= {"forced_skip": [torch.from_numpy(f) for f in skipped]}
        out = decoder(**given)
    assert [s.tolist() for s in out.selected] == [f.tolist() for f in forced]
    assert [s.tolist() for s in out.skipped] == [f.tolist() for f in skipped]
    assert [s.tolist() for s in free.selected] != [f.tolist() for f in forced]
    same(
        [out.logits[0], *out.scores[1:], *out.skip_scores],
        [expected.logits, *expected.scores[1:], *expected.skip_scores],
    )


@pytest.mark.parametrize("keep", [3, 7])
def test_gathered_rows_equal_masked_rows(checkpoint: Path, keep: int) -> None:
    """A budget drops rows; a threshold between the same rows hides them. Text cannot tell the two apart."""
    visual = rows()
    gathers = decoder_of(checkpoint, Decisions(select=(Select(layer=2, keep=keep, by=INFLUENCE),)))
    with torch.no_grad():
        scores = gathers(**feed(gathers.schedule, PROMPT, visual)).scores[0].sort(descending=True).values
    rule = ValueInfluence(threshold=float(scores[keep - 1] + scores[keep]) / 2)
    masks = decoder_of(checkpoint, Decisions(select=(Select(layer=2, keep=16, by=rule),)))
    same(answers(gathers, PROMPT, visual), answers(masks, PROMPT, visual))
    with torch.no_grad():
        shown = masks(**feed(masks.schedule, PROMPT, visual)).present_visible[0]
    assert shown.shape == (16 + 5,) and int(shown[:16].sum()) == keep and shown[16:].all()


def test_a_mask_is_passed_on_to_fewer_rows(checkpoint: Path) -> None:
    """Rows that a threshold hides stay hidden where a later selection without one keeps some of them."""
    visual = rows(seed=3)
    later = Select(layer=3, keep=8, by=RandomOrder(seed=2))
    first = Select(layer=1, keep=16, by=INFLUENCE)
    decoder = decoder_of(checkpoint, Decisions(select=(first, later)))
    with torch.no_grad():
        scores = decoder(**feed(decoder.schedule, PROMPT, visual)).scores[0]
    half = Select(layer=1, keep=16, by=ValueInfluence(threshold=float(scores.median())))
    decoder = decoder_of(checkpoint, Decisions(select=(half, later)))
    with torch.no_grad():
        out = decoder(**feed(decoder.schedule, PROMPT, visual))
    kept = out.selected[1]
    before, after = out.present_visible
    assert decoder.schedule.masks == (0, 1)
    assert after[:8].tolist() == before[kept].tolist()
    assert 0 < int(after[:8].sum()) < 8


def test_without_an_image_only_layers_that_are_left_out_matter(checkpoint: Path) -> None:
    ids, none = [1, 5, 7, 8], rows(0)
    full = decoder_of(
        checkpoint,
        Decisions(
            select=(
                Select(layer=1, keep=9, by=INFLUENCE),
                Select(layer=2, keep=5, by=CrossAndSelfAttention()),
            ),
            skip=SkipMode(stages=(SkipStage(layer=3, count=5),)),
            layers=(
                LayerRule(layers=(3,), query="unskipped"),
                LayerRule(layers=(4,), text_keys="sink", visual_keys="none"),
            ),
            mask="post_softmax",
        ),
    )
    same(answers(full, ids, none), answers(decoder_of(checkpoint, Decisions()), ids, none))


def test_decode_only_layers_leave_the_prompt_alone(checkpoint: Path) -> None:
    """They write keys and values of their unchanged input, and run whole at decode."""
    visual = rows(seed=5)
    skips = decoder_of(checkpoint, Decisions(layers=(LayerRule(layers=(2,), execute="none"),)))
    later = decoder_of(checkpoint, Decisions(layers=(LayerRule(layers=(2,), execute="decode"),)))
    never, decodes = answers(skips, PROMPT, visual), answers(later, PROMPT, visual)
    same(never[:1], decodes[:1])
    assert all((a - b).abs().max() > 0.01 for a, b in zip(never[1:], decodes[1:], strict=True))


@pytest.mark.parametrize(
    ("decisions", "changed"),
    [
        (Decisions(), {}),
        (Decisions(layers=(LayerRule(layers=(2,), query="none", ffn="none"),)), {2: (5, 5, 21, 5)}),
        (Decisions(layers=(LayerRule(layers=(2,), execute="none"),)), {2: (0, 0, 0, 0)}),
        # A decode-only layer runs its last row at prefill too, for shapes that are known.
        (Decisions(layers=(LayerRule(layers=(2,), execute="decode"),)), {2: (1, 1, 21, 1)}),
        (Decisions(layers=(LayerRule(layers=(1,), sublayers="ffn"),)), {1: (0, 0, 0, 21)}),
        (Decisions(layers=(LayerRule(layers=(1,), sublayers="attention"),)), {1: (21, 21, 21, 0)}),
        (Decisions(select=(Select(layer=4, keep=6, by=INFLUENCE),)), {4: (1, 1, 11, 1)}),
        (Decisions(select=(Select(layer=4, keep=6, by=CrossAndSelfAttention()),)), {4: (21, 11, 21, 11)}),
        (
            Decisions(
                skip=SkipMode(stages=(SkipStage(layer=2, count=10),), entropy=False),
                layers=(LayerRule(layers=(2,), query="unskipped"), LayerRule(layers=(3,), ffn="unskipped")),
            ),
            {2: (11, 11, 21, 21), 3: (21, 21, 21, 11)},
        ),
    ],
)  # fmt: skip
def test_only_rows_that_the_schedule_keeps_are_multiplied(
    checkpoint: Path, decisions: Decisions, changed: dict[int, tuple[int, int, int, int]]
) -> None:
    """FLOPs of all matrix products with weights, from rows of (Q, O, K and V, FFN) of each layer. In the last
    layer only keys and values are wanted of other rows than the last."""
    decoder = decoder_of(checkpoint, decisions)
    given = feed(decoder.schedule, PROMPT, rows())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(**given)
    by_operator = counter.get_flop_counts()["Global"]
    found = sum(v for operator, v in by_operator.items() if str(operator) in {"aten.mm", "aten.addmm"})
    spec = decoder.schedule.model
    kv, products = spec.kv_heads * spec.head_dim, spec.hidden * spec.vocab  # the LM head's last row
    for layer in range(LAYERS):
        usual = (1, 1, 21, 1) if layer == LAYERS - 1 else (21, 21, 21, 21)
        q, o, keys, ffn = changed.get(layer, usual)
        products += spec.hidden * ((q + o) * spec.hidden + 2 * keys * kv + 3 * ffn * spec.ffn)
    assert found == 2 * products


def test_unknown_activation_is_refused(checkpoint: Path) -> None:
    spec, source = loaded(checkpoint)
    other = type(source.config).from_dict(source.config.to_dict())
    other.text_config.hidden_act = "gelu"
    with pytest.raises(UserError, match=r"hidden_act.*gelu.*silu"):
        make_decoder(other, resolve(Decisions(), spec))
