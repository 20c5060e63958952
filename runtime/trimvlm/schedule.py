"""The Schedule: the per-layer table that a Profile resolves to for a given model.

Everything static follows from it: budgets, KV lengths, FLOPs (`accounting.py`), graph inputs and outputs.
The reference and the exported decoder share this table and nothing else.

What a row means, for layer l with T text rows and `live` visual rows:

* rows that enter: all text rows and `live` visual rows, after injection, exit, `select` and `skip`, in this
  order. Where there is an encoder stage, injection brings its rows, and positions are those of a prompt with
  so many visual tokens per image;
* row i sees key j where position(i) >= position(j), both are live, and the key is not hidden by
  `text_keys` (hides visual keys from text rows), by `visual_keys` (hides visual keys from visual rows, their
  own included) or by a threshold (`masked_by`: hides it from every row, its own included). A row that sees
  no key gets zeros from the attention;
* mask `post_softmax`: keys that `text_keys` and `visual_keys` hide take part in the softmax and lose their
  weight after it, without renormalising; `text_keys: sink` adds what a text row's hidden visual keys lose to
  its weight for the first live visual row. A threshold hides before the softmax under either mask;
* visual rows outside `query` get no attention output, visual rows outside `ffn` no FFN output: their
  residual stream passes unchanged. Their keys and values exist all the same. `unskipped` rows are the live
  ones that are not in skip mode;
* `sublayers` leaves out the attention or the FFN for every row, at prefill and decode; without attention
  there are no keys and values. `execute: decode` computes keys and values of all rows at prefill and nothing
  else, and the whole layer at decode; `execute: none` nothing ever;
* the cache keeps the keys and values of all text rows and of the visual rows in `cache`;
* a selection by `cross_and_self_attention` acts after its layer's attention: `live`, keys and cache of that
  layer are those before it, and only survivors (`after`) go through output projection, FFN and beyond;
* at decode there are no visual rows: every cached key is visible, but for those that a threshold hides.
  `text_keys` and `visual_keys` are about prefill only.
"""

from __future__ import annotations

from typing import Any, Literal

from trimvlm.errors import UserError
from trimvlm.profile import (
    ActiveRows,
    Decisions,
    Execute,
    LayerRule,
    ModelSpec,
    Profile,
    Rows,
    Select,
    SkipMode,
    Sublayers,
    TextKeys,
    check_fits,
)
from trimvlm.rules import CrossAndSelfAttention, ValueInfluence
from trimvlm.schedule_checks import check_encoder, check_row, check_select, check_skip, check_whole
from trimvlm.value import Value


class Row(Value, frozen=True, kw_only=True):
    """One decoder layer. Counts are visual rows of one image.

    Attributes:
        layer: 0-based number.
        live: visual rows whose keys this layer computes (after a `select` at its input).
        after: visual rows that leave this layer; differs from `live` where a selection acts inside it.
        select: the selection at this layer, or None.
        skipped: rows in skip mode.
        skip_stage: rows enter skip mode at this layer's input.
        masked_by: number of the selection whose threshold hides some of the live rows, or None.
    """

    layer: int
    live: int
    after: int
    select: Select | None = None
    skipped: int = 0
    skip_stage: bool = False
    masked_by: int | None = None
    query: ActiveRows = "live"
    text_keys: TextKeys = "live"
    visual_keys: Rows = "live"
    ffn: ActiveRows = "live"
    cache: Rows = "live"
    execute: Execute = "both"
    sublayers: Sublayers = "both"

    @property
    def attends(self) -> bool:
        """The layer has keys and values."""
        return self.execute != "none" and self.sublayers != "ffn"

    @property
    def queries(self) -> int:
        """Visual rows that compute Q and attention at prefill."""
        return self._active(self.query, self.live) if self.attends else 0

    @property
    def ffn_rows(self) -> int:
        """Visual rows that run the FFN at prefill."""
        return 0 if self.sublayers == "attention" else self._active(self.ffn, self.after)

    @property
    def cached(self) -> int:
        """Visual keys and values kept for decode."""
        return self.live if self.cache == "live" and self.attends else 0

    @property
    def selects_inside(self) -> bool:
        """The selection acts after this layer's attention, not at its input."""
        return self.select is not None and isinstance(self.select.by, CrossAndSelfAttention)

    def _active(self, rows: ActiveRows, live: int) -> int:
        if rows == "none" or self.execute != "both":
            return 0
        return live - self.skipped if rows == "unskipped" else live


class Schedule(Value, frozen=True, kw_only=True):
    """Per-layer table and what holds for all layers.

    Attributes:
        visual_tokens: visual rows of one image that enter the decoder.
    """

    model: ModelSpec
    visual_tokens: int
    rows: tuple[Row, ...]
    inject: int
    exit: int
    skip: SkipMode | None
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
        return tuple(dict.fromkeys(row.cached for row in self.rows if row.attends))

    @property
    def masks(self) -> tuple[int, ...]:
        """Selections whose threshold hides cached rows, ascending: decode needs a visibility input each."""
        return tuple(sorted({row.masked_by for row in self.rows if row.masked_by is not None and row.cached}))

    @property
    def stages(self) -> tuple[Row, ...]:
        """Rows that select, in layer order; stage s is the s-th."""
        return tuple(row for row in self.rows if row.select)

    @property
    def skip_stages(self) -> tuple[Row, ...]:
        """Rows at whose input visual rows enter skip mode, in layer order."""
        return tuple(row for row in self.rows if row.skip_stage)

    def live_before(self, layer: int) -> int:
        """Visual rows that reach the input of `layer`, before its `select`."""
        if not self.inject <= layer < self.exit:
            return 0
        return self.visual_tokens if layer == self.inject else self.rows[layer - 1].after


def resolve(decisions: Decisions, model: ModelSpec) -> Schedule:
    """Turns decisions into the table, refusing what cannot be.

    Raises:
        UserError: naming the layer and the field.
    """
    last = model.layers
    exit_ = last if decisions.exit is None else decisions.exit
    exceptions = _per_layer(decisions.layers, last)
    check_whole(decisions, model, exit_, exceptions)
    check_encoder(decisions.encoder, model)
    visual_tokens = decisions.encoder.keep if decisions.encoder else model.visual_tokens
    selects = _selections(decisions.select, decisions.inject, exit_)
    skips = {stage.layer: stage.count for stage in decisions.skip.stages} if decisions.skip else {}
    rows: list[Row] = []
    live = skipped = 0
    masked_by: int | None = None
    for layer in range(last):
        if layer == decisions.inject:
            live = visual_tokens
        if layer == exit_:
            live, skipped, masked_by = 0, 0, None
        select = selects.get(layer)
        after = live
        if select:
            check_select(select, live)
            after = select.keep
            if isinstance(select.by, ValueInfluence) and select.by.threshold is not None:
                masked_by = sorted(selects).index(layer)
            elif masked_by is not None:
                masked_by = sorted(selects).index(layer)  # the same rows hidden, among fewer
            if not isinstance(select.by, CrossAndSelfAttention):
                live = after
        skipped = skips.get(layer, skipped)
        row = Row(
            layer=layer, live=live, after=after, select=select, skipped=skipped, skip_stage=layer in skips,
            masked_by=masked_by, **exceptions.get(layer, {}),
        )  # fmt: skip
        check_row(row, exceptions.get(layer, {}), rows[-1] if rows else None)
        rows.append(row)
        live = after
    schedule = Schedule(
        model=model,
        visual_tokens=visual_tokens,
        rows=tuple(rows),
        inject=decisions.inject,
        exit=exit_,
        skip=decisions.skip,
        positions=decisions.positions,
        mask=decisions.mask,
    )
    check_skip(schedule, decisions)
    return schedule


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
        if select.layer in by_layer:
            raise UserError(f"layer {select.layer}: select: two selections at one layer")
        by_layer[select.layer] = select
    return by_layer
