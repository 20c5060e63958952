"""The probe's figures against independent ones from plain transformers and torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.profile import Decisions, LayerRule
from trimvlm.schedule import resolve
from trimvlm_calib.probe import Probe
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.reference import Reference


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("probe"), kv_heads=2, seed=5)
    model = LlavaForConditionalGeneration.from_pretrained(
        path, dtype="float32", attn_implementation="eager"
    ).eval()
    inputs = [tiny_inputs(path, f"what is w{number} ?", seed=number) for number in range(3)]
    return model, model_spec(path), inputs


@torch.no_grad()
def log_probs(model, spec, inputs, decisions):
    with Reference(model, resolve(decisions, spec)) as reference:
        return [torch.from_numpy(reference.prefill(each).logits).double().log_softmax(0) for each in inputs]


def test_divergence_is_kl_in_nats(case):
    model, spec, inputs = case
    decisions = Decisions(exit=1)
    full = log_probs(model, spec, inputs, Decisions())
    pruned = log_probs(model, spec, inputs, decisions)
    probe = Probe(model, spec, inputs)
    for direction, pairs in (
        ("full||pruned", zip(full, pruned, strict=True)),
        ("pruned||full", zip(pruned, full, strict=True)),
    ):
        wanted = np.mean(
            [float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")) for p, q in pairs]
        )
        assert wanted > 0.1
        assert probe.divergence(decisions, direction, "") == pytest.approx(wanted, rel=1e-5)
    assert probe.divergence(Decisions(), "full||pruned", "") == 0


def test_sweep_fills_a_curve(case):
    model, spec, inputs = case
    calls = []
    probe = Probe(model, spec, inputs, progress=lambda *call: calls.append(call))
    candidates = {layer: Decisions(layers=(LayerRule(layers=(layer,), query="none"),)) for layer in (1, 3)}
    curve = probe.sweep("VIG", candidates, "full||pruned")
    assert curve[0] is curve[2] is None
    assert curve[1] == pytest.approx(probe.divergence(candidates[1], "full||pruned", ""), rel=1e-5)
    assert curve[3] == 0  # visual rows of the last layer are read by nobody
    assert curve[1] > 1e-3
    assert calls[:6] == [(what, done, 3) for what in ("dense", "VIG, layer 1") for done in (1, 2, 3)]


@torch.no_grad()
def test_visual_similarity_is_that_of_the_plain_model(case):
    model, spec, inputs = case
    wanted = []
    for each in inputs:
        output = model(**each, output_hidden_states=True)
        visual = each["input_ids"][0] == model.config.image_token_id
        states = [state[0, visual] for state in output.hidden_states[:-1]]  # the last one is normed
        wanted.append([float(torch.cosine_similarity(a, b).mean()) for a, b in pairwise(states)])
    got = Probe(model, spec, inputs).visual_similarity()
    assert len(got) == spec.layers
    np.testing.assert_allclose(got[:-1], np.mean(wanted, axis=0), rtol=1e-4)


@torch.no_grad()
def test_visual_attention_is_that_of_the_plain_model(case):
    model, spec, inputs = case
    for got, each in zip(Probe(model, spec, inputs).visual_attention(Decisions()), inputs, strict=True):
        attentions = model(**each, output_attentions=True).attentions
        visual = each["input_ids"][0] == model.config.image_token_id
        wanted = np.stack([layer[0, :, -1, visual].numpy() for layer in attentions])
        assert got.shape == (spec.layers, spec.heads, spec.visual_tokens)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
