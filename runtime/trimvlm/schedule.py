"""The Schedule: the per-layer table that a Profile resolves to for a given model.

Everything static follows from it: budgets, KV lengths, FLOPs (`accounting.py`), graph inputs and outputs.
The reference and the exported decoder share this table and nothing else.

What a row means, for layer l with T text rows and `live` visual rows:

* rows that enter: all text rows and `live` visual rows, after injection and after `select`;
* row i sees key j where position(i) >= position(j), both are live, and the key is not hidden by
  `text_keys` (hides visual keys from text rows) or `visual_keys` (hides visual keys from visual rows,
  their own included);
* visual rows outside `query` get no attention output, visual rows outside `ffn` no FFN output: their
  residual stream passes unchanged. Their keys and values exist all the same;
* the cache keeps the keys and values of all text rows and of the visual rows in `cache`;
* at decode there are no visual rows: every cached key is visible. `text_keys` and `visual_keys` are about
  prefill only.
"""

from __future__ import annotations

from typing import Any, Literal

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Profile, Rows, Select, Value, check_fits

TENSORRT_TOPK_LIMIT = 3840  # documented limit of TensorRT's TopK operator


class Row(Value, frozen=True, kw_only=True):
    """One decoder layer. Counts are visual rows of one image.

    Attributes:
        layer: 0-based number.
        live: visual rows in the residual stream while this layer runs (after `select`).
        select: the selection at this layer's input, or None.
    """

    layer: int
    live: int
    select: Select | None = None
    query: Rows = "live"
    text_keys: Rows = "live"
    visual_keys: Rows = "live"
    ffn: Rows = "live"
    cache: Rows = "live"
    execute: Literal["both", "none"] = "both"

    @property
    def queries(self) -> int:
        """Visual rows that compute Q, attention and O."""
        return self.live if self.query == "live" else 0

    @property
    def ffn_rows(self) -> int:
        """Visual rows that run the FFN."""
        return self.live if self.ffn == "live" else 0

    @property
    def cached(self) -> int:
        """Visual keys and values kept for decode."""
        return self.live if self.cache == "live" and self.execute == "both" else 0


class Schedule(Value, frozen=True, kw_only=True):
    """Per-layer table and what holds for all layers."""

    model: ModelSpec
    rows: tuple[Row, ...]
    inject: int
    exit: int
    positions: Literal["persistent", "compact"]
    mask: Literal["additive", "post_softmax"]

    @classmethod
    def resolve(cls, profile: Profile, model: ModelSpec) -> Schedule:
        """Resolves a Profile for `model`.

        Raises:
            UserError: the Profile was made for another model, or its decisions cannot be; the message names
                the layer and the field.
        """
        check_fits(profile, model)
        try:
            return resolve(profile.decisions, model)
        except UserError as error:
            raise UserError(f"profile {profile.name}: {error}") from None

    @property
    def mean_visual_tokens(self) -> float:
        """Mean over all layers of the live visual rows: the papers' "number of tokens"."""
        return sum(row.live for row in self.rows) / len(self.rows)

    @property
    def kv_groups(self) -> tuple[int, ...]:
        """Distinct numbers of cached visual rows, in order of first use: one symbolic KV length each."""
        return tuple(dict.fromkeys(row.cached for row in self.rows if row.execute == "both"))

    @property
    def stages(self) -> tuple[Row, ...]:
        """Rows that select, in layer order; stage s is the s-th."""
        return tuple(row for row in self.rows if row.select)

    def live_before(self, layer: int) -> int:
        """Visual rows that reach the input of `layer`, before its `select`."""
        if not self.inject <= layer < self.exit:
            return 0
        return self.model.visual_tokens if layer == self.inject else self.rows[layer - 1].live


def resolve(decisions: Decisions, model: ModelSpec) -> Schedule:
    """Turns decisions into the table, refusing what cannot be.

    Raises:
        UserError: naming the layer and the field.
    """
    last = model.layers
    exit_ = last if decisions.exit is None else decisions.exit
    exceptions = _per_layer(decisions.layers, last)
    _check_whole(decisions, last, exit_, exceptions)
    selects = _selections(decisions.select, decisions.inject, exit_)
    rows: list[Row] = []
    live = 0
    for layer in range(last):
        if layer == decisions.inject:
            live = model.visual_tokens
        if layer == exit_:
            live = 0
        select = selects.get(layer)
        if select:
            if select.keep > live:
                raise UserError(f"layer {layer}: select.keep: budget {select.keep} grows from {live}")
            if select.keep > TENSORRT_TOPK_LIMIT:
                raise UserError(
                    f"layer {layer}: select.keep: TensorRT's TopK takes at most {TENSORRT_TOPK_LIMIT}, "
                    f"not {select.keep}"
                )
            live = select.keep
        row = Row(layer=layer, live=live, select=select, **exceptions.get(layer, {}))
        _check_row(row, exceptions.get(layer, {}), rows[-1] if rows else None)
        rows.append(row)
    return Schedule(
        model=model,
        rows=tuple(rows),
        inject=decisions.inject,
        exit=exit_,
        positions=decisions.positions,
        mask=decisions.mask,
    )


def _check_whole(decisions: Decisions, last: int, exit_: int, said: dict[int, dict[str, Any]]) -> None:
    """What holds for all layers together; `said` is the union of the rules per layer."""
    if not 0 <= decisions.inject < last:
        raise UserError(f"inject: layer {decisions.inject} is not within 0..{last - 1}")
    if not decisions.inject < exit_ <= last:
        raise UserError(f"exit: layer {exit_} is not within {decisions.inject + 1}..{last}")
    if decisions.positions == "compact":
        if decisions.inject:
            raise UserError("positions: late injection needs persistent position ids")
        for layer, fields in said.items():
            if fields.get("cache") == "none":
                raise UserError(f"layer {layer}: cache: compact position ids need the live rows in the cache")
    if decisions.mask == "post_softmax" and not any(
        "none" in (fields.get("text_keys"), fields.get("visual_keys")) for fields in said.values()
    ):
        raise UserError("mask: post_softmax has no effect where no layer hides visual keys")


def _per_layer(rules: tuple[LayerRule, ...], last: int) -> dict[int, dict[str, Any]]:
    """Field-wise union of the rules; the same field of one layer may not be said in two ways."""
    fields_of: dict[int, dict[str, Any]] = {}
    for rule in rules:
        said = {f: getattr(rule, f) for f in LayerRule.__struct_fields__ if f != "layers"}
        said = {f: value for f, value in said.items() if value is not None}
        if not said or not rule.layers:
            raise UserError("layers: an entry needs layer numbers and at least one field")
        for layer in rule.layers:
            if not 0 <= layer < last:
                raise UserError(f"layers: layer {layer} is not within 0..{last - 1}")
            known = fields_of.setdefault(layer, {})
            for field, value in said.items():
                if known.setdefault(field, value) != value:
                    raise UserError(f"layer {layer}: {field}: both {known[field]} and {value} are asked for")
    return fields_of


def _selections(selects: tuple[Select, ...], inject: int, exit_: int) -> dict[int, Select]:
    by_layer: dict[int, Select] = {}
    for select in selects:
        if not inject <= select.layer < exit_:
            raise UserError(
                f"layer {select.layer}: select: visual rows are live in layers {inject}..{exit_ - 1} only"
            )
        if select.keep < 1:
            raise UserError(f"layer {select.layer}: select.keep: {select.keep} is less than 1; use exit")
        if select.layer in by_layer:
            raise UserError(f"layer {select.layer}: select: two selections at one layer")
        if select.layer == inject and select.by.attention == "previous":
            raise UserError(
                f"layer {select.layer}: select.by.attention: no layer before it has seen the visual rows; "
                "use own"
            )
        by_layer[select.layer] = select
    return by_layer


def _check_row(row: Row, said: dict[str, Any], before: Row | None) -> None:
    where = f"layer {row.layer}"
    if row.execute == "none":
        if extra := sorted(set(said) - {"execute"}):
            raise UserError(f"{where}: {extra[0]}: has no effect in a layer that is not executed")
        if row.select and row.select.by.attention == "own":
            raise UserError(f"{where}: select.by.attention: own scores need the layer to be executed")
    elif not row.live and (extra := sorted(field for field, value in said.items() if value == "none")):
        raise UserError(f"{where}: {extra[0]}: none has no effect, no visual rows are live in this layer")
    if row.query == "none" and row.visual_keys == "none":
        raise UserError(f"{where}: visual_keys: none has no effect where query is none")
    if row.select and row.select.by.attention == "previous":
        assert before is not None
        if before.execute == "none" or before.text_keys == "none":
            raise UserError(
                f"{where}: select.by.attention: layer {before.layer} has no attention from text to visual "
                "rows to rank by; use own"
            )
    if row.select and row.select.by.attention == "own" and row.text_keys == "none":
        raise UserError(
            f"{where}: select.by.attention: own scores contradict text_keys none in the same layer"
        )
