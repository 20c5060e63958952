"""The masked reference against a naive decoder that really gathers rows, for random decisions.

Persistent position ids: gathering rows and running the layer on them alone is the same function as the full
layer with the dropped keys masked. Compact ids: the naive decoder renumbers, and the result must differ.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm_export.reference import Reference

LAYERS, HEADS, KV, C, N = 4, 4, 2, 16, 16
SPEC = ModelSpec(
    family="llava",
    layers=LAYERS,
    hidden=64,
    heads=HEADS,
    kv_heads=KV,
    head_dim=C,
    ffn=96,
    vocab=64,
    visual_tokens=N,
)


class NaiveGather:
    """Rows are a list of (place in the prompt, vector); a layer only ever sees the rows that it is given."""

    def __init__(self, model, decisions):
        self.w = {k.removeprefix("model."): v.float() for k, v in model.state_dict().items()}
        self.d = decisions
        self.eps = model.config.text_config.rms_norm_eps

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rope(self, x, places):  # x [rows, heads, C]; pairs are (i, i + C/2)
        angles = torch.tensor(places)[:, None].float() * 10000.0 ** (-torch.arange(0, C, 2).float() / C)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., : C // 2], x[..., C // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def qkv(self, x, at, places):
        x = self.norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (self.linear(x, f"{at}.self_attn.{p}_proj").view(len(x), -1, C) for p in ("q", "k", "v"))
        return self.rope(q, places), self.rope(k, places), v

    def rule(self, layer, field, default):
        said = [getattr(rule, field) for rule in self.d.layers if layer in rule.layers]
        return next((value for value in said if value is not None), default)

    def places(self, rows):
        return list(range(len(rows))) if self.d.positions == "compact" else rows

    def attend(self, q, keys, values, sees):
        """q [H, C] of one row; sees: which keys. Returns [H*C] and weights [H, keys]."""
        out, weights = [], torch.zeros(HEADS, len(keys))
        for h in range(HEADS):
            k, v = keys[:, h // (HEADS // KV)], values[:, h // (HEADS // KV)]
            index = [j for j, seen in enumerate(sees) if seen]
            p = torch.softmax((k[index] @ q[h]) / C**0.5, 0) if index else torch.zeros(0)
            weights[h, index] = p
            out.append(p @ v[index])
        return torch.cat(out), weights

    def prefill(self, ids, features, images):  # noqa: PLR0912 - naive on purpose, from top to bottom
        d, S = self.d, len(ids)
        is_text = [int(i) != 4 for i in ids]
        number = {s: n for n, s in enumerate(s for s in range(S) if not is_text[s])}  # visual row numbers
        embed = self.w["language_model.embed_tokens.weight"]
        rows = [s for s in range(S) if is_text[s]]
        x = {s: embed[ids[s]] for s in rows}
        previous, self.selected, self.cache, self.counts = {}, [], [], []
        for layer in range(LAYERS):
            at = f"language_model.layers.{layer}"
            if layer == d.inject:
                x |= {s: features[n] for s, n in number.items()}
                rows = list(range(S))
            if layer == (LAYERS if d.exit is None else d.exit):
                rows = [s for s in rows if is_text[s]]
            for select in (s for s in d.select if s.layer == layer):
                if select.by.attention == "own":
                    q, k, v = self.qkv(torch.stack([x[s] for s in rows]), at, self.places(rows))
                    weights = self.attend(q[-1], k, v, [True] * len(rows))[1]
                    score = dict(zip(rows, weights.mean(0).tolist(), strict=True))
                else:
                    score = previous
                visual = sorted((s for s in rows if not is_text[s]), key=lambda s: (-score[s], s))
                kept = visual[: select.keep * images]
                self.selected.append(sorted(number[s] for s in kept))
                rows = [s for s in rows if is_text[s] or s in kept]
            self.counts.append(len(rows))
            if self.rule(layer, "execute", "both") == "none":
                self.cache.append(None)
                continue
            h = torch.stack([x[s] for s in rows])
            q, k, v = self.qkv(h, at, self.places(rows))
            hides = {
                True: self.rule(layer, "text_keys", "live"),
                False: self.rule(layer, "visual_keys", "live"),
            }
            for i, s in enumerate(rows):
                causal = [j <= i for j in range(len(rows))]
                hidden = [hides[is_text[s]] == "none" and not is_text[r] for r in rows]
                if d.mask == "additive":
                    out, weights = self.attend(q[i], k, v, np.array(causal) & ~np.array(hidden))
                else:
                    _, weights = self.attend(q[i], k, v, causal)
                    weights[:, torch.tensor(hidden)] = 0
                    out = torch.einsum("hj,jhc->hc", weights, v.repeat_interleave(HEADS // KV, 1)).flatten()
                if is_text[s] or self.rule(layer, "query", "live") == "live":
                    x[s] = x[s] + self.linear(out, f"{at}.self_attn.o_proj")
            previous = dict(zip(rows, weights.mean(0).tolist(), strict=True))
            for s in rows:
                if is_text[s] or self.rule(layer, "ffn", "live") == "live":
                    x[s] = x[s] + self.ffn(x[s], at)
            kept = [
                i for i, s in enumerate(rows) if is_text[s] or self.rule(layer, "cache", "live") == "live"
            ]
            self.cache.append((k[kept], v[kept]))
        self.length, self.generated = S, 0
        return self.logits(x[S - 1])

    def ffn(self, x, at):
        x = self.norm(x, f"{at}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.linear(x, f"{at}.mlp.gate_proj"))
        return self.linear(gate * self.linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")

    def logits(self, x):
        return (self.norm(x, "language_model.norm.weight") @ self.w["lm_head.weight"].T).numpy()

    def step(self, token):
        x = self.w["language_model.embed_tokens.weight"][token]
        for layer in range(LAYERS):
            if self.cache[layer] is None:
                continue
            at = f"language_model.layers.{layer}"
            start = self.counts[layer] if self.d.positions == "compact" else self.length
            q, k, v = self.qkv(x[None], at, [start + self.generated])
            keys, values = (torch.cat(pair) for pair in zip(self.cache[layer], (k, v), strict=True))
            self.cache[layer] = (keys, values)
            out, _ = self.attend(q[0], keys, values, [True] * len(keys))
            x = x + self.linear(out, f"{at}.self_attn.o_proj")
            x = x + self.ffn(x, at)
        self.generated += 1
        return self.logits(x)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("gather"), kv_heads=KV, attention_bias=True, seed=11)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, {images: tiny_inputs(path, images=images) for images in (1, 2)}


@torch.no_grad()
def compare(case, decisions, images=1, steps=(9, 30, 12)):
    """Largest difference of selections, KV lengths and logits over the prefill and three decode steps."""
    model, inputs = case[0], case[1][images]
    naive = NaiveGather(model, decisions)
    with Reference(model, resolve(decisions, SPEC)) as reference:
        run = reference.prefill(inputs)
        wanted = [naive.prefill(inputs["input_ids"][0], reference.features(inputs), images)]
        got = [run.logits]
        lengths = [None if kv is None else kv[0].shape[2] for kv in run.kv]
        assert lengths == [None if kv is None else len(kv[0]) for kv in naive.cache]
        for token in steps:
            got.append(reference.step(token))
            wanted.append(naive.step(token))
    assert [list(rows) for rows in run.selected] == naive.selected
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    return run


OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
FASTV = Decisions(select=(Select(layer=2, keep=8, by=PREVIOUS),))
PDROP = Decisions(
    select=tuple(Select(layer=i, keep=k, by=OWN) for i, k in ((1, 8), (2, 4), (3, 2))), positions="compact"
)


@pytest.mark.parametrize(
    "decisions",
    [
        FASTV,
        PDROP,
        Decisions(exit=2),
        Decisions(exit=2, positions="compact"),
        Decisions(inject=1, exit=3, select=(Select(layer=2, keep=5, by=OWN),)),
        Decisions(inject=2, select=(Select(layer=2, keep=5, by=OWN), Select(layer=3, keep=1, by=PREVIOUS))),
        Decisions(layers=(LayerRule(layers=(0, 2), cache="none"), LayerRule(layers=(1,), execute="none"))),
        Decisions(layers=(LayerRule(layers=(0, 1), text_keys="none"),), mask="post_softmax"),
    ],
    ids=["fastv", "pyramiddrop", "vtw", "vtw-compact", "hidivdrop", "late", "cache", "visipruner"],
)
@pytest.mark.parametrize("images", [1, 2])
def test_masking_equals_gathering(case, decisions, images):
    compare(case, decisions, images)


rows = st.sampled_from([None, "none"])
rules = st.builds(
    LayerRule,
    layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=2, unique=True).map(tuple),
    query=rows,
    text_keys=rows,
    visual_keys=rows,
    ffn=rows,
    cache=rows,
    execute=st.sampled_from([None, None, None, "none"]),
)
selects = st.builds(
    Select, layer=st.integers(0, LAYERS - 1), keep=st.integers(1, N), by=st.sampled_from([OWN, PREVIOUS])
)
decisions = st.builds(
    Decisions,
    inject=st.sampled_from([0, 0, 1, 2]),
    exit=st.sampled_from([None, 2, 3]),
    select=st.lists(selects, max_size=2).map(tuple),
    layers=st.lists(rules, max_size=2).map(tuple),
    positions=st.sampled_from(["persistent", "persistent", "compact"]),
    mask=st.sampled_from(["additive", "post_softmax"]),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(decisions)
def test_masking_equals_gathering_for_whatever_is_allowed(case, decisions):
    try:
        resolve(decisions, SPEC)
    except UserError:
        assume(False)
    compare(case, decisions)


def test_compact_ids_are_another_function(case):
    persistent = compare(case, FASTV)
    compact = compare(case, msgspec.structs.replace(FASTV, positions="compact"))
    assert list(persistent.selected[0]) == list(compact.selected[0])
    assert np.abs(persistent.logits - compact.logits).max() > 0.01
