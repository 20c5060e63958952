"""The probe's figures against independent ones from plain transformers and torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.encoder_rules import EncoderStage
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention, RandomOrder
from trimvlm.schedule import resolve
from trimvlm_calib.prefix import first_change, pays_off
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
    assert calls[:6] == [("VIG", done, 6) for done in range(1, 7)]


BYPASS = {layer: Decisions(layers=(LayerRule(layers=(layer,), query="none"),)) for layer in range(4)}
PREVIOUS = LastRowAttention(attention="previous")
DROP = {layer: Decisions(select=(Select(layer=layer, keep=5, by=PREVIOUS),)) for layer in range(1, 4)}
INJECT = {layer: Decisions(inject=layer) for layer in range(1, 4)}


@pytest.mark.parametrize(
    ("candidates", "layers_run"),
    [
        (BYPASS, 4 + 4 + 3 + 2 + 1),  # (L + 1) / 2 + 1 prefills
        (DROP, 4 + 4 + 3 + 2),  # the layer before is run too, its attention ranks
        (INJECT, 4 + 3 * 4),  # nothing can be reused
    ],
    ids=["bypass", "drop", "inject"],
)
def test_a_sweep_reuses_the_dense_prefix(case, candidates, layers_run):
    model, spec, inputs = case
    run = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: run.append(module))
        for layer in model.model.language_model.layers
    ]
    try:
        got = Probe(model, spec, inputs).divergences("", candidates, "full||pruned")
    finally:
        for hook in hooks:
            hook.remove()
    assert len(run) == layers_run * len(inputs)
    full = log_probs(model, spec, inputs, Decisions())
    for layer, decisions in candidates.items():
        pairs = zip(full, log_probs(model, spec, inputs, decisions), strict=True)
        wanted = np.mean([float((p.exp() * (p - q)).sum()) for p, q in pairs])
        assert got[layer] == pytest.approx(wanted, rel=1e-6, abs=1e-15)


def test_first_change(case):
    _, spec, _ = case
    assert first_change(Decisions(), spec) == 3
    assert first_change(Decisions(exit=2), spec) == 2
    assert first_change(DROP[2], spec) == 1
    own = (Select(layer=2, keep=5, by=LastRowAttention(attention="own")),)
    assert first_change(Decisions(select=own), spec) == 2
    whole = EncoderStage(keep=spec.visual_tokens, by=RandomOrder())
    assert first_change(Decisions(encoder=whole, exit=2), spec) == 0


def test_a_single_candidate_is_run_whole_once_the_dense_model_is_known():
    assert pays_off([3, 3], 4, dense_known=True)  # 6 layers of 8
    assert not pays_off([3], 4, dense_known=True)  # 5 of 4
    assert pays_off([1], 4, dense_known=False)  # 7 of 8
    assert not pays_off([0, 0, 0], 4, dense_known=False)


def test_cosine_of_the_logits(case):
    model, spec, inputs = case
    wanted = []
    for each in inputs:
        rows = []
        for decisions in (Decisions(), Decisions(exit=1)):
            with Reference(model, resolve(decisions, spec)) as reference:
                rows.append(torch.from_numpy(reference.prefill(each).logits).double())
        wanted.append(float(torch.cosine_similarity(*rows, dim=0)))
    got = Probe(model, spec, inputs).divergence(Decisions(exit=1), "cosine", "")
    assert got == pytest.approx(1 - np.mean(wanted), rel=1e-6)


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
@pytest.mark.parametrize("sublayer", ["attention", "ffn"])
def test_sublayer_similarity_is_that_of_the_plain_model(case, sublayer):
    """The residual stream between the sub-layers, by adding what the attention module returns."""
    model, spec, inputs = case
    layers = model.model.language_model.layers
    entering, added, leaving = [], [], []
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, o: added.append(o[0][0])) for layer in layers]
    hooks += [layer.register_forward_hook(lambda m, a, o: entering.append(a[0][0])) for layer in layers]
    hooks += [layer.register_forward_hook(lambda m, a, o: leaving.append(o[0])) for layer in layers]
    wanted = []
    for each in inputs:
        for states in (entering, added, leaving):
            states.clear()
        model(**each)
        visual = each["input_ids"][0] == model.config.image_token_id
        between = [a + b for a, b in zip(entering, added, strict=True)]
        edge = entering if sublayer == "attention" else leaving
        pairs = zip(edge, between, strict=True)
        wanted.append([float(torch.cosine_similarity(a[visual], b[visual]).mean()) for a, b in pairs])
    for hook in hooks:
        hook.remove()
    got = Probe(model, spec, inputs).sublayer_similarity(sublayer)
    assert len(got) == spec.layers
    np.testing.assert_allclose(got, np.mean(wanted, axis=0), rtol=1e-5)
