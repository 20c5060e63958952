"""Prefix reuse: a run that starts at a later layer, with the residual stream of a dense run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.reference import Reference

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("resume"), kv_heads=2, attention_bias=True)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, model_spec(path), tiny_inputs(path)


def prefill(case, decisions, **kwargs) -> Any:
    model, spec, inputs = case
    with Reference(model, resolve(decisions, spec)) as reference:
        return reference.prefill(inputs, **kwargs)


RESUMED = {
    "exit": Decisions(exit=2),
    "skip": Decisions(layers=(LayerRule(layers=(2,), query="none"), LayerRule(layers=(3,), execute="none"))),
    "own": Decisions(select=(Select(layer=2, keep=5, by=OWN), Select(layer=3, keep=2, by=PREVIOUS))),
    "compact": Decisions(select=(Select(layer=3, keep=5, by=PREVIOUS),), positions="compact"),
    "post_softmax": Decisions(layers=(LayerRule(layers=(2,), text_keys="none"),), mask="post_softmax"),
}


@pytest.mark.parametrize("decisions", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_resumed_run_is_the_whole_run(case, decisions, first):
    """And costs (L - l) / L of it."""
    model, spec, inputs = case
    dense = prefill(case, Decisions())
    with Reference(model, resolve(decisions, spec)) as reference:
        whole = reference.prefill(inputs)
        assert reference.layers_run == 4
        late = reference.prefill(inputs, resume=(first, dense.hidden[first]))
        assert reference.layers_run == 4 + 4 - first
        assert len(model.model.language_model.layers) == 4
        reference.prefill(inputs)
        reference.step(7)
        assert reference.layers_run == 12 - first
    assert np.abs(whole.logits - dense.logits).max() > 0.01
    np.testing.assert_array_equal(late.logits, whole.logits)
    for field in ("selected", "scores"):
        for got, wanted in zip(getattr(late, field), getattr(whole, field), strict=True):
            np.testing.assert_array_equal(got, wanted)
    for field in ("live", "last_row", "hidden"):
        got, wanted = getattr(late, field), getattr(whole, field)
        assert len(got) == len(wanted)
        for layer in range(first, len(wanted)):
            np.testing.assert_array_equal(got[layer], wanted[layer])
    assert [kv is None for kv in late.kv] == [
        layer < first or kv is None for layer, kv in enumerate(whole.kv)
    ]


@pytest.mark.parametrize(
    ("decisions", "words"),
    [
        (Decisions(exit=1), "layer 1 is not as in the dense model"),
        (Decisions(inject=1), "layer 0 is not as in the dense model"),
        (Decisions(layers=(LayerRule(layers=(1,), cache="none"),)), "layer 1 is not as in the dense model"),
        (Decisions(select=(Select(layer=2, keep=5, by=PREVIOUS),)), "selects by the attention of layer 1"),
    ],
)
def test_resume_is_refused_where_the_prefix_is_not_dense(case, decisions, words):
    dense = prefill(case, Decisions())
    with pytest.raises(UserError, match=words):
        prefill(case, decisions, resume=(2, dense.hidden[2]))
    with pytest.raises(UserError, match=r"0\.\.3"):
        prefill(case, Decisions(), resume=(4, dense.hidden[4]))
