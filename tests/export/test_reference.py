"""The reference against plain Hugging Face and against the definitions of the methods."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm_export.reference import Reference
from trimvlm_export.reference_rows import attention, best

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
SPEC = ModelSpec(
    family="llava",
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab=64,
    visual_tokens=16,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("gqa"), kv_heads=2, attention_bias=True)


@pytest.fixture(scope="module")
def model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32").eval()


@pytest.fixture(scope="module")
def inputs(checkpoint):
    return tiny_inputs(checkpoint)


def prefill(model, inputs, decisions, **kwargs) -> Any:
    with Reference(model, resolve(decisions, SPEC)) as reference:
        return reference.prefill(inputs, **kwargs)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("tie", [False, True])
def test_dense_is_plain_generate(tmp_path, images, tie):
    """The bar: token for token the same as `generate`, in float32."""
    path = tiny_llava(tmp_path, kv_heads=2, tie=tie, seed=3)
    model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    lengths = []
    for seed in range(3):
        inputs = tiny_inputs(path, images=images, seed=seed)
        whole = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        wanted = whole[0, inputs["input_ids"].shape[1] :].tolist()
        with Reference(model, resolve(Decisions(), SPEC)) as reference:
            assert reference.generate(inputs, 12) == wanted
        lengths.append(len(wanted))
    assert max(lengths) > 3


def test_dense_hidden_states_and_kv_are_those_of_the_model(model, inputs):
    run = prefill(model, inputs, Decisions())
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True, use_cache=True)
    assert len(run.hidden) == SPEC.layers + 1
    for got, wanted in zip(run.hidden[:-1], plain.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(got, wanted[0], atol=1e-5)
    np.testing.assert_allclose(run.logits, plain.logits[0, -1], atol=1e-5)
    visual_first = np.argsort(inputs["input_ids"][0].numpy() != 4, kind="stable")
    for kv, stored in zip(run.kv, plain.past_key_values.layers, strict=True):
        np.testing.assert_allclose(kv[0], stored.keys[:, :, visual_first], atol=1e-5)
        np.testing.assert_allclose(kv[1], stored.values[:, :, visual_first], atol=1e-5)


def test_the_model_is_as_before_afterwards(model, inputs):
    before = model.model.language_model.config._attn_implementation
    decisions = Decisions(exit=1, layers=(LayerRule(layers=(0,), query="none"),))
    with torch.no_grad():
        plain = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), Reference(model, resolve(decisions, SPEC)):
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, plain)
    assert model.model.language_model.config._attn_implementation == before


def test_vskip_takes_back_the_attention_of_visual_rows_only(model, inputs):
    """V-Skip section 3: no attention output for visual rows, their FFN runs, text rows are as when dense."""
    dense = prefill(model, inputs, Decisions())
    run = prefill(model, inputs, Decisions(layers=(LayerRule(layers=(2,), query="none"),)))
    text = inputs["input_ids"][0].numpy() != 4
    layer = model.model.language_model.layers[2]
    with torch.no_grad():
        before = torch.from_numpy(run.hidden[2])
        expected = before + layer.mlp(layer.post_attention_layernorm(before))
    np.testing.assert_array_equal(run.hidden[2], dense.hidden[2])
    np.testing.assert_allclose(run.hidden[3][~text], expected[~text], atol=1e-6)
    np.testing.assert_allclose(run.hidden[3][text], dense.hidden[3][text], atol=1e-6)
    assert np.abs(run.hidden[3][~text] - dense.hidden[3][~text]).max() > 0.1
    for got, wanted in zip(run.kv[2], dense.kv[2], strict=True):  # keys and values exist all the same
        np.testing.assert_array_equal(got, wanted)


def test_shortv_freezes_visual_rows(model, inputs):
    rule = LayerRule(layers=(1, 2), query="none", ffn="none")
    run = prefill(model, inputs, Decisions(layers=(rule,)))
    visual = inputs["input_ids"][0].numpy() == 4
    np.testing.assert_array_equal(run.hidden[3][visual], run.hidden[1][visual])
    assert np.abs(run.hidden[2][~visual] - run.hidden[1][~visual]).max() > 0.1


def test_execute_none_is_the_identity_and_caches_nothing(model, inputs):
    decisions = Decisions(layers=(LayerRule(layers=(1,), execute="none"),))
    with Reference(model, resolve(decisions, SPEC)) as reference:
        run = reference.prefill(inputs)
        np.testing.assert_array_equal(run.hidden[2], run.hidden[1])
        assert run.kv[1] is None
        stepped = reference.step(7)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[7]])], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    np.testing.assert_allclose(stepped, prefill(model, longer, decisions).logits, atol=1e-5)


def test_post_softmax_is_masked_softmax_times_text_mass():
    """VisiPruner's zero after the softmax = additive mask x (1 - visual mass of that row and head)."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    unseen = torch.zeros(9, 9, dtype=torch.bool)
    unseen[5:, 2:5] = True
    literal, zeroed = attention(None, query, key, value, None, 1.0, visible, unseen)
    additive, _ = attention(None, query, key, value, None, 1.0, visible & ~unseen)
    _, dense = attention(None, query, key, value, None, 1.0, visible)
    mass = (dense * unseen).sum(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(literal, additive * (1 - mass))
    assert float((literal - additive).abs().max()) > 0.05
    assert float((zeroed * unseen).abs().max()) == 0


def test_post_softmax_and_additive_differ_in_the_model(model, inputs):
    rules = (LayerRule(layers=(0, 1), text_keys="none"), LayerRule(layers=(0,), visual_keys="none"))
    literal = prefill(model, inputs, Decisions(layers=rules, mask="post_softmax"))
    additive = prefill(model, inputs, Decisions(layers=rules))
    visual = inputs["input_ids"][0].numpy() == 4
    for run in (literal, additive):
        assert run.last_row[0][:, visual].max() == 0
        assert run.last_row[2][:, visual].max() > 0
    assert (literal.last_row[0].sum(axis=1) < 0.999).any()
    np.testing.assert_allclose(additive.last_row[0].sum(axis=1), 1, atol=1e-5)
    assert np.abs(literal.logits - additive.logits).max() > 0.01


def test_forced_selections_replace_the_ranking(model, inputs):
    decisions = Decisions(select=(Select(layer=1, keep=5, by=PREVIOUS), Select(layer=2, keep=2, by=OWN)))
    free = prefill(model, inputs, decisions)
    again = prefill(model, inputs, decisions, forced=free.selected)
    np.testing.assert_array_equal(again.logits, free.logits)
    other = [np.arange(5), np.array([0, 4])]
    run = prefill(model, inputs, decisions, forced=other)
    assert [list(rows) for rows in run.selected] == [[0, 1, 2, 3, 4], [0, 4]]
    assert np.abs(run.logits - free.logits).max() > 0.01
    assert [len(scores) for scores in run.scores] == [16, 5]


def test_rows_that_are_not_live_are_seen_by_nobody(model, inputs):
    decisions = Decisions(select=(Select(layer=1, keep=5, by=OWN),), exit=3)
    with Reference(model, resolve(decisions, SPEC)) as reference:
        clean, step = reference.prefill(inputs), reference.step(9)
        visual = np.flatnonzero(inputs["input_ids"][0].numpy() == 4)
        dropped = np.setdiff1d(visual, visual[clean.selected[0]])

        def disturb(module, args, output):
            if output.shape[1] > 1:
                output = output.clone()
                output[0, dropped] += 100.0
            return output

        layer = model.model.language_model.layers[1]
        handle = layer.register_forward_hook(disturb)
        try:
            disturbed, disturbed_step = reference.prefill(inputs), reference.step(9)
        finally:
            handle.remove()
    assert np.abs(disturbed.hidden[2][dropped] - clean.hidden[2][dropped]).min() > 50
    np.testing.assert_array_equal(disturbed.logits, clean.logits)
    np.testing.assert_array_equal(disturbed_step, step)


def test_two_images_share_one_budget(model, checkpoint):
    run = prefill(
        model, tiny_inputs(checkpoint, images=2), Decisions(select=(Select(layer=1, keep=3, by=OWN),))
    )
    assert len(run.selected[0]) == 6
    assert len(run.scores[0]) == 32
    np.testing.assert_array_equal(run.selected[0], np.sort(np.argsort(-run.scores[0], kind="stable")[:6]))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60), st.data())
def test_best_prefers_the_lower_index(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    chosen = best(np.array(scores, np.float32), count)
    assert list(chosen) == sorted(chosen)
    assert set(chosen) == set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


keep_all = st.builds(
    Decisions,
    select=st.lists(st.integers(0, 3), unique=True, max_size=4).map(
        lambda layers: tuple(Select(layer=layer, keep=16, by=OWN) for layer in sorted(layers))
    ),
    positions=st.sampled_from(["persistent", "compact"]),
)


@settings(max_examples=15, deadline=None)
@given(keep_all)
def test_keeping_everything_is_dense(model, inputs, decisions):
    dense = prefill(model, inputs, Decisions(), detail=False)
    run = prefill(model, inputs, decisions, detail=False)
    np.testing.assert_array_equal(run.logits, dense.logits)


def test_what_cannot_be_run_is_refused(model, inputs):
    with pytest.raises(UserError, match="layers 5"):
        Reference(model, resolve(Decisions(), msgspec.structs.replace(SPEC, layers=5)))
    fifteen = resolve(Decisions(), msgspec.structs.replace(SPEC, visual_tokens=15))
    with Reference(model, fifteen) as reference, pytest.raises(UserError, match="16 image tokens"):
        reference.prefill(inputs)
    with Reference(model, resolve(Decisions(), SPEC)) as reference:
        with pytest.raises(UserError, match="one prompt at a time"):
            mask = inputs["attention_mask"].clone()
            mask[0, 0] = 0
            reference.prefill({**inputs, "attention_mask": mask})
        with pytest.raises(UserError, match="ends in an image"):
            reference.prefill({**inputs, "input_ids": inputs["input_ids"][:, :18], "attention_mask": None})
        with pytest.raises(UserError, match="its images give 0"):
            reference.prefill({**inputs, "pixel_values": None})
