"""A decoder that really gathers rows, one row and one head at a time: `NaiveDecoder(model, decisions)`.

It reads Decisions and the checkpoint's weights and shares nothing with the reference, the exported decoder or
the Schedule. Rows are known by their place in the prompt; a layer only ever sees the rows that it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trimvlm.rules import LastRowAttention, RandomOrder, RouterScores, TextAttention, ValueInfluence

IMAGE = 4  # id of the image token in tiny models


class NaiveDecoder:
    """After `prefill`: `selected` and `scores` per selection, `skipped` and `skip_scores` per skip stage,
    `cache` per layer (keys, values, places of the rows, those that are visible), or None.
    """

    def __init__(self, model: Any, decisions: Any) -> None:
        self.w = {k.removeprefix("model."): v.float() for k, v in model.state_dict().items()}
        self.d, text = decisions, model.config.text_config
        self.eps, self.layers = text.rms_norm_eps, text.num_hidden_layers
        self.heads, self.groups, self.c = text.num_attention_heads, text.num_key_value_heads, text.head_dim

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rope(self, x, places):  # x [rows, heads, C]; pairs are (i, i + C/2)
        half = self.c // 2
        angles = torch.tensor(places)[:, None].float() * 10000.0 ** (-torch.arange(half).float() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def qkv(self, x, at, places):
        x = self.norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (self.linear(x, f"{at}.self_attn.{p}_proj").view(len(x), -1, self.c) for p in "qkv")
        v = v.repeat_interleave(self.heads // self.groups, 1)
        return self.rope(q, places), self.rope(k, places).repeat_interleave(self.heads // self.groups, 1), v

    def ffn(self, x, at):
        x = self.norm(x, f"{at}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self.linear(x, f"{at}.mlp.gate_proj"))
        return self.linear(gate * self.linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")

    def weights(self, q, keys, sees):
        """Attention weights [H, keys] of one row's q [H, C]; `sees` says which keys there are for it."""
        weights = torch.zeros(self.heads, len(keys))
        index = [j for j, seen in enumerate(sees) if seen]
        for head in range(self.heads):
            if index:
                weights[head, index] = torch.softmax(keys[index, head] @ q[head] / self.c**0.5, 0)
        return weights

    def rule(self, layer, field, default="live"):
        said = [getattr(rule, field) for rule in self.d.layers if layer in rule.layers]
        return next((value for value in said if value is not None), default)

    def place(self, rows):
        return list(range(len(rows))) if self.d.positions == "compact" else rows

    def prefill(self, ids, features, images, router=None):
        self.length, self.generated = len(ids), 0
        self.is_text = [int(i) != IMAGE for i in ids]
        self.number = {s: n for n, s in enumerate(s for s in range(len(ids)) if not self.is_text[s])}
        self.images, self.router = images, np.asarray(router)
        self.per_image = len(self.number) // images
        embed = self.w["language_model.embed_tokens.weight"]
        raw = {s: features[n] for s, n in self.number.items()}
        self.h0 = {s: embed[ids[s]] for s in range(len(ids)) if self.is_text[s]} | raw
        self.rows = [s for s in range(len(ids)) if self.is_text[s]]
        self.x = {s: self.h0[s] for s in self.rows}
        self.selected, self.scores, self.skipped, self.skip_scores, self.cache = [], [], [], [], []
        self.hidden, self.skips, self.total = set(), set(), dict.fromkeys(self.number, 0.0)
        self.previous: Any = None
        for layer in range(self.layers):
            if layer == self.d.inject:
                self.x |= raw
                self.rows = list(range(self.length))
            if layer == self.d.exit:
                self.rows = [s for s in self.rows if self.is_text[s]]
            inside = None
            for select in self.d.select:
                if select.layer == layer and select.by.__class__.__name__ == "CrossAndSelfAttention":
                    inside = select
                elif select.layer == layer:
                    self.keep(select, self.rank(select.by, layer))
            for stage in self.d.skip.stages if self.d.skip else ():
                if stage.layer == layer:
                    self.enter_skip_mode(stage.count)
            self.layer(layer, inside)
        return self.logits(self.x[self.length - 1])

    def visual(self):
        return [s for s in self.rows if not self.is_text[s]]

    def rank(self, by, layer):
        """Score of each live visual row."""
        if isinstance(by, RandomOrder):
            order = list(np.random.default_rng(by.seed).permutation(self.per_image))
            return {s: float(order[self.number[s] % self.per_image]) for s in self.visual()}
        if isinstance(by, RouterScores):
            return {s: float(self.router[self.number[s]]) for s in self.visual()}
        if isinstance(by, LastRowAttention) and by.attention == "own":
            at = f"language_model.layers.{layer}"
            q, k, _ = self.qkv(torch.stack([self.x[s] for s in self.rows]), at, self.place(self.rows))
            own = self.weights(q[-1], k, [s not in self.hidden for s in self.rows])
            return {s: float(own[:, i].mean()) for i, s in enumerate(self.rows) if not self.is_text[s]}
        rows, weights, values = self.previous
        column = {s: j for j, s in enumerate(rows)}
        if isinstance(by, LastRowAttention):
            return {s: float(weights[rows[-1]][:, column[s]].mean()) for s in self.visual()}
        if isinstance(by, TextAttention):
            return {
                s: sum(float(weights[t][:, column[s]].mean()) for t in self.raters()) for s in self.visual()
            }
        assert isinstance(by, ValueInfluence)  # literally: without this token, how far does the output move?
        last = weights[rows[-1]].double()
        output = torch.einsum("hj,jhc->hc", last, values.double())
        score = {}
        for s in self.visual():
            without = last.clone()
            without[:, column[s]] = 0
            moved = torch.einsum("hj,jhc->hc", without, values.double()) - output
            score[s] = float(moved.pow(2).sum().sqrt())
        if by.threshold is not None:
            self.hidden |= {s for s in score if score[s] <= by.threshold}
        return score

    def raters(self):
        after = range(max(self.number) + 1, self.length)
        mean = dict.fromkeys(after, 0.0)
        for s in self.number:
            row = torch.softmax(torch.stack([self.h0[s] @ self.h0[t] for t in after]), 0)
            for t, share in zip(after, row.tolist(), strict=True):
                mean[t] += share / len(self.number)
        return [t for t in after if mean[t] >= sum(mean.values()) / len(mean)]

    def keep(self, select, score):
        best = sorted(score, key=lambda s: (-score[s], s))[: select.keep * self.images]
        self.selected.append(sorted(self.number[s] for s in best))
        self.scores.append([score[s] for s in sorted(score)])
        self.rows = [s for s in self.rows if self.is_text[s] or s in best]

    def enter_skip_mode(self, count):
        live, terms = self.visual(), []
        if self.d.skip.entropy:
            p = {s: torch.softmax(self.w["lm_head.weight"] @ self.x[s], 0) for s in live}
            terms.append({s: float(-(p[s] * p[s].log()).sum()) for s in live})
        if self.d.skip.correlation:
            text = torch.stack([self.x[s] for s in self.rows if self.is_text[s]]).mean(0)
            terms.append({s: float(self.x[s] @ text / self.x[s].norm() / text.norm()) for s in live})
        for s in live:
            scaled = [
                (t[s] - min(t.values())) / (max(t.values()) - min(t.values()))
                if len(set(t.values())) > 1
                else 0
                for t in terms
            ]
            self.total[s] += max(0.0, 1 - sum(scaled))
        others = sorted((s for s in live if s not in self.skips), key=lambda s: (-self.total[s], s))
        self.skips |= set(others[: count * self.images - len(self.skips)])
        self.skipped.append(sorted(self.number[s] for s in self.skips))
        self.skip_scores.append([self.total[s] for s in live])

    def layer(self, layer, inside):
        at, parts = f"language_model.layers.{layer}", self.rule(layer, "sublayers", "both")
        execute, rows = self.rule(layer, "execute", "both"), self.rows
        if execute == "none" or parts == "ffn":
            self.cache.append(None)
        else:
            q, k, v = self.qkv(torch.stack([self.x[s] for s in rows]), at, self.place(rows))
            cached = self.rule(layer, "cache") == "live"
            kept = [i for i, s in enumerate(rows) if cached and not self.is_text[s]]
            kept += [i for i, s in enumerate(rows) if self.is_text[s]]
            shown = [rows[i] not in self.hidden for i in kept]
            self.cache.append((k[kept], v[kept], shown, len(rows)))
            if execute == "both":
                self.attend(layer, (q, k, v), inside)
        if execute == "both" and parts != "attention":
            for s in self.rows:
                if self.runs(layer, "ffn", s):
                    self.x[s] = self.x[s] + self.ffn(self.x[s], at)

    def runs(self, layer, field, s):
        rule = self.rule(layer, field)
        return self.is_text[s] or rule == "live" or (rule == "unskipped" and s not in self.skips)

    def attend(self, layer, qkv, inside):
        rows, weights, (q, k, v) = self.rows, {}, qkv
        for i, s in enumerate(rows):
            rule = self.rule(layer, "text_keys" if self.is_text[s] else "visual_keys")
            blind = [j for j, r in enumerate(rows) if rule != "live" and not self.is_text[r]]
            sees = [j <= i and r not in self.hidden for j, r in enumerate(rows)]
            if self.d.mask == "additive":
                weights[s] = self.weights(q[i], k, [seen and j not in blind for j, seen in enumerate(sees)])
            else:
                weights[s] = self.weights(q[i], k, sees)
                lost = weights[s][:, blind].sum(1)
                weights[s][:, blind] = 0
                if rule == "sink" and blind:
                    weights[s][:, blind[0]] = lost
        self.previous = rows, weights, v
        if inside is not None:
            most = {s: weights[s].max(0).values for s in rows}
            from_text, from_visual = (
                torch.stack([most[s] for s in rows if self.is_text[s] == text]).sum(0)
                for text in (True, False)
            )
            score = dict(zip(rows, (from_text * from_visual).tolist(), strict=True))
            self.keep(inside, {s: score[s] for s in self.visual()})
        for s in self.rows:
            if self.runs(layer, "query", s):
                out = torch.einsum("hj,jhc->hc", weights[s], v).flatten()
                self.x[s] = self.x[s] + self.linear(out, f"language_model.layers.{layer}.self_attn.o_proj")

    def logits(self, x):
        return (self.norm(x, "language_model.norm.weight") @ self.w["lm_head.weight"].T).numpy()

    def step(self, token):
        x = self.w["language_model.embed_tokens.weight"][token]
        for layer in range(self.layers):
            at, parts = f"language_model.layers.{layer}", self.rule(layer, "sublayers", "both")
            cached = self.cache[layer]
            if cached is not None:
                start = cached[3] if self.d.positions == "compact" else self.length
                q, k, v = self.qkv(x[None], at, [start + self.generated])
                keys, values, shown = torch.cat([cached[0], k]), torch.cat([cached[1], v]), [*cached[2], True]
                self.cache[layer] = (keys, values, shown, cached[3])
                out = torch.einsum("hj,jhc->hc", self.weights(q[0], keys, shown), values).flatten()
                x = x + self.linear(out, f"{at}.self_attn.o_proj")
            if self.rule(layer, "execute", "both") != "none" and parts != "attention":
                x = x + self.ffn(x, at)
        self.generated += 1
        return self.logits(x)
