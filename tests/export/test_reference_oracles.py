"""What must hold without trained weights: the published definitions against the forms that are computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm_calib.influence import influence
from trimvlm_calib.methods.shortgpt import block_influence
from trimvlm_calib.probe import Probe
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.reference import Reference
from trimvlm_export.reference_rows import attention, best
from trimvlm_export.reference_scores import random_order, raters, text_attention, value_influence


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("oracles"), seed=21)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, model_spec(path), tiny_inputs(path)


def prefill(case, decisions) -> Any:
    model, spec, inputs = case
    with Reference(model, resolve(decisions, spec)) as reference:
        return reference.prefill(inputs)


def layer_of_slices(model, number, hidden, positions, computing):
    """One decoder layer for rows `hidden` [S, D] at `positions`; only rows in `computing` query and attend.

    Returns:
        The rows after the attention, and the weights [H, queries, S].
    """
    decoder = model.model.language_model
    layer, config = decoder.layers[number], decoder.config
    heads, size = config.num_attention_heads, config.head_dim
    normed = layer.input_layernorm(hidden)
    q, k, v = (
        getattr(layer.self_attn, f"{name}_proj")(normed[rows]).view(-1, heads, size).transpose(0, 1)[None]
        for name, rows in (("q", computing), ("k", slice(None)), ("v", slice(None)))
    )
    cos, sin = decoder.rotary_emb(hidden[None], positions[None])

    def turned(x, rows):
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * cos[:, None, rows] + half * sin[:, None, rows]

    visible = positions[computing][:, None] >= positions
    out, weights = attention(None, turned(q, computing), turned(k, slice(None)), v, None, size**-0.5, visible)
    after = hidden.clone()
    after[computing] += layer.self_attn.o_proj(out.flatten(2)[0])
    return after, weights[0]


@torch.no_grad()
@pytest.mark.parametrize("ffn", [None, "none"])
def test_a_sliced_layer_is_compute_all_and_zero_the_delta(case, ffn):
    """V-Skip and ShortV: visual rows neither query nor attend, keys and values are of all.

    Matrix products of other shapes round otherwise, so the slices agree to rounding; bit for bit the result
    is the same whatever the visual rows' queries and FFN inputs are.
    """
    model, _, inputs = case
    decisions = Decisions(layers=(LayerRule(layers=(1,), query="none", ffn=ffn),))
    run = prefill(case, decisions)
    visual = inputs["input_ids"][0] == 4
    text = torch.from_numpy(np.flatnonzero(~visual))
    hidden, layer = torch.from_numpy(run.hidden[1]), model.model.language_model.layers[1]
    after, _ = layer_of_slices(model, 1, hidden, torch.arange(len(hidden)), text)
    fed = torch.arange(len(hidden)) if ffn is None else text
    after[fed] += layer.mlp(layer.post_attention_layernorm(after[fed]))
    np.testing.assert_allclose(run.hidden[2], after, atol=2e-6)
    if ffn:
        np.testing.assert_array_equal(run.hidden[2][visual], run.hidden[1][visual])

    def disturb(module, args, output):
        return output + visual[:, None] * torch.randn(output.shape)

    hooks = [layer.self_attn.q_proj.register_forward_hook(disturb)]
    if ffn:
        hooks.append(layer.mlp.up_proj.register_forward_hook(disturb))
    disturbed = prefill(case, decisions)
    dense = [prefill(case, Decisions()) for _ in range(2)]
    for hook in hooks:
        hook.remove()
    np.testing.assert_array_equal(disturbed.hidden[2], run.hidden[2])
    np.testing.assert_array_equal(disturbed.logits, run.logits)
    assert np.abs(dense[0].hidden[2] - dense[1].hidden[2]).max() > 0.1


@torch.no_grad()
def test_gather_then_run_is_the_full_layer_with_dropped_keys_masked(case):
    """Within 2e-7 of the largest value; with compacted positions it is another function."""
    model, _, inputs = case
    own = LastRowAttention(attention="own")
    run = prefill(case, Decisions(select=(Select(layer=1, keep=7, by=own),)))
    visual = inputs["input_ids"][0].numpy() == 4
    rows = np.setdiff1d(
        np.arange(len(visual)), np.setdiff1d(np.flatnonzero(visual), np.flatnonzero(visual)[run.selected[0]])
    )
    hidden, everyone = torch.from_numpy(run.hidden[1][rows]), torch.arange(len(rows))
    layer = model.model.language_model.layers[1]

    def error(positions):
        after, _ = layer_of_slices(model, 1, hidden, positions, everyone)
        after += layer.mlp(layer.post_attention_layernorm(after))
        return np.abs(after.numpy() - run.hidden[2][rows]).max() / np.abs(run.hidden[2][rows]).max()

    assert error(torch.from_numpy(rows)) <= 2e-7
    assert error(everyone) > 1e-3


@st.composite
def last_rows(draw):
    """Attention weights of all rows [H, S, S] and values [G, S, C] of random shape and scale."""
    groups, per_group, size = (draw(st.integers(1, limit)) for limit in (4, 3, 8))
    rows = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(groups * per_group, rows, rows)) * draw(st.sampled_from([0.3, 2.0, 6.0]))
    weights = torch.softmax(torch.tensor(scores, dtype=torch.float32), dim=-1)
    values = rng.normal(size=(groups, rows, size)) * draw(st.sampled_from([0.01, 1.0, 30.0]))
    return weights, torch.tensor(values, dtype=torch.float32)


@settings(max_examples=100, deadline=None)
@given(last_rows())
def test_value_influence_is_what_happens_without_the_token(last):
    """VisiPruner literally: zero one column, recompute O. Norms and cosines select identical sets."""
    weights, values = last
    heads, size = weights.shape[0], weights.shape[1]
    wide = values.double().repeat_interleave(heads // values.shape[0], dim=0)
    output = (weights[:, -1:].double() @ wide).flatten()
    norms, cosines, left = np.empty((3, size))
    for token in range(size):
        without = weights[:, -1:].double()
        without[:, :, token] = 0
        other = (without @ wide).flatten()
        norms[token], left[token] = (output - other).norm(), other.norm()
        cosines[token] = torch.cosine_similarity(output, other, dim=0)
    ours = value_influence(weights, values, np.arange(size))
    closed_cosines, closed_norms = influence(weights[:, -1].numpy(), values.numpy(), size)
    clear = left > 1e-3 * float(output.norm())  # where nothing else is left its direction is rounding
    np.testing.assert_allclose(ours, norms, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(closed_norms, norms, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(closed_cosines[clear], cosines[clear], atol=1e-6)
    for share in (0.2, 0.5, 0.9):
        if (cut := _between(norms, share)) is not None:
            count = int((norms > cut).sum())
            assert (
                list(best(ours, count))
                == list(np.flatnonzero(ours > cut))
                == list(np.flatnonzero(norms > cut))
            )
        if (cut := _between(cosines, share)) is not None:
            assert list((closed_cosines < cut)[clear]) == list((cosines < cut)[clear])


def _between(values, share):
    """A threshold half way between two neighbours; None where they are equal but for rounding."""
    ranked = np.sort(values)
    place = min(int(share * len(ranked)), len(ranked) - 2)
    low, high = ranked[place : place + 2]
    return (low + high) / 2 if high - low > 1e-5 * abs(high) else None


def test_a_sink_gives_lost_mass_to_the_first_visual_value():
    """VisiPruner's layer 0: masked softmax times (1 - visual mass), plus visual mass times one value."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 3, 9, 8, generator=generator) for _ in range(3))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    unseen, sink = torch.zeros(2, 9, 9, dtype=torch.bool)
    unseen[:, 2:5] = True
    sink[5:, 2] = True
    literal, weights = attention(None, query, key, value, None, 1.0, visible, unseen, sink)
    additive, _ = attention(None, query, key, value, None, 1.0, visible & ~unseen)
    _, dense = attention(None, query, key, value, None, 1.0, visible)
    mass = (dense * unseen).sum(-1).transpose(1, 2)[..., None]
    first = mass * sink.any(1)[:, None, None] * value.transpose(1, 2)[:, 2:3]
    torch.testing.assert_close(literal, additive * (1 - mass) + first)
    torch.testing.assert_close(weights[0, :, 5:].sum(-1), torch.ones(3, 4))


@pytest.mark.parametrize("size", [576, 453, 215, 87, 283, 10, 5])
def test_dtopk_is_topk_in_float32_and_not_in_16_bit(size):
    """HiDivDrop: sigmoid(n (c' - a)) > 0.5 with c' the share of scores not above and a = 1 - k / n."""
    scores = torch.from_numpy(np.random.default_rng(size).random(size, np.float32) / size)
    for keep, chosen in enumerate(_dtopk(scores), start=1):
        assert chosen.tolist() == best(scores.numpy(), keep).tolist()
    if size > 200:
        assert max(len(chosen) - keep for keep, chosen in enumerate(_dtopk(scores.half()), start=1)) >= 1


def _dtopk(scores):
    """The chosen indices for k = 1..n."""
    n = len(scores)
    share = (scores[:, None] >= scores).sum(dim=1).float() / n
    return [np.flatnonzero(torch.sigmoid(n * (share - (1 - k / n))) > 0.5) for k in range(1, n + 1)]


def test_shortgpt_is_one_minus_cosine(case):
    """Over plain transformers' hidden states, the last one before the final norm."""
    model, spec, inputs = case
    states = []
    hook = model.model.language_model.norm.register_forward_pre_hook(
        lambda module, args: states.append(args[0])
    )
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True).hidden_states[: spec.layers]
    hook.remove()
    chain = [*before, states[0]]
    wanted = [
        1 - float(torch.cosine_similarity(a[0].double(), b[0].double(), dim=1).mean())
        for a, b in pairwise(chain)
    ]
    found = np.array(block_influence(Probe(model, spec, [inputs])), np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert max(wanted) > 0.01


def test_raters_and_text_attention_by_hand():
    """Two visual rows, three text rows after them; logarithms make the softmax easy to follow."""
    is_text = np.array([True, False, False, True, True, True])
    embedded = torch.zeros(6, 3)
    embedded[3:] = torch.eye(3)
    embedded[1] = torch.tensor([6.0, 3.0, 1.0]).log()
    embedded[2] = torch.tensor([1.0, 4.0, 5.0]).log()
    # Shares .6 .3 .1 and .1 .4 .5, mean .35 .35 .30: the third is below the mean of a third.
    assert raters(embedded, is_text).tolist() == [False, False, False, True, True, False]
    weights = torch.zeros(2, 6, 6)
    weights[:, 3, 1], weights[:, 4, 1], weights[:, 5, 2] = torch.tensor([[0.2], [0.1], [0.9]]).expand(3, 2)
    weights[0, 4, 2] = 0.4
    scores = text_attention(weights, raters(embedded, is_text), np.array([1, 2]))
    np.testing.assert_allclose(scores, [0.3, 0.2], atol=1e-6)


def test_random_order_is_the_same_in_every_image():
    scores = random_order(7, 5, 2)
    assert sorted(scores[:5]) == [0, 1, 2, 3, 4]
    assert scores.tolist() == [*np.random.default_rng(7).permutation(5)] * 2
    assert best(scores, 4).tolist() == sorted(index for index, place in enumerate(scores) if place >= 3)
