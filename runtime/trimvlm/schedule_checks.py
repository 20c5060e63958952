"""What a Schedule refuses: every combination that cannot be, named by layer and field."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from trimvlm.encoder_rules import EncoderStage, MsvPrune, PruMerge, VisionZip, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, ModelSpec, Select
from trimvlm.rules import CrossAndSelfAttention, reads

if TYPE_CHECKING:
    from trimvlm.schedule import Row, Schedule

TENSORRT_TOPK_LIMIT = 3840  # documented limit of TensorRT's TopK operator


def check_whole(decisions: Decisions, model: ModelSpec, exit_: int, said: dict[int, dict[str, Any]]) -> None:
    """What holds for all layers together; `said` is the union of the rules per layer."""
    last = model.layers
    if not 0 <= decisions.inject < last:
        raise UserError(f"inject: layer {decisions.inject} is not within 0..{last - 1}")
    if not decisions.inject < exit_ <= last:
        raise UserError(f"exit: layer {exit_} is not within {decisions.inject + 1}..{last}")
    if decisions.positions == "compact":
        if model.mrope:
            raise UserError(
                "positions: compact ids are single numbers, and this model rotates by rows and columns; "
                "positions: persistent"
            )
        if decisions.inject:
            raise UserError("positions: late injection needs persistent position ids")
        for layer, fields in said.items():
            if fields.get("cache") == "none":
                raise UserError(f"layer {layer}: cache: compact position ids need the live rows in the cache")
        for select in decisions.select:
            if isinstance(select.by, CrossAndSelfAttention):
                raise UserError(
                    f"layer {select.layer}: select.by: a selection inside a layer needs persistent position "
                    "ids"
                )
    hiding = ("none" in (f.get("text_keys"), f.get("visual_keys")) for f in said.values())
    sinks = [layer for layer, f in said.items() if f.get("text_keys") == "sink"]
    if decisions.mask == "post_softmax" and not (any(hiding) or sinks):
        raise UserError("mask: post_softmax has no effect where no layer hides visual keys")
    if decisions.mask == "additive" and sinks:
        raise UserError(
            f"layer {sinks[0]}: text_keys: sink moves weights after the softmax; mask: post_softmax"
        )


def check_encoder(stage: EncoderStage | None, model: ModelSpec) -> None:
    """Budgets of the encoder stage."""
    if stage is None:
        return
    if not 1 <= stage.keep <= model.visual_tokens:
        raise UserError(f"encoder.keep: {stage.keep} is not within 1..{model.visual_tokens}")
    rule, rest = stage.by, model.visual_tokens
    if isinstance(rule, MsvPrune):
        complement = stage.keep - int(stage.keep * rule.anchors)
        if 0 < complement < rule.clusters:
            raise UserError(
                f"encoder.by.clusters: {rule.clusters} clusters cannot share {complement} tokens; take fewer "
                "clusters, fewer anchors or a larger budget"
            )
    if isinstance(rule, VisPruner):
        important = int(stage.keep * rule.important)
        diverse, rest = stage.keep - important, model.visual_tokens - important
        if diverse > rest:
            raise UserError(
                f"encoder.by.important: {diverse} diverse tokens are more than {rest} that remain"
            )
    if isinstance(rule, VisionZip) and not 0 <= rule.contextual < stage.keep:
        raise UserError(f"encoder.by.contextual: {rule.contextual} is not within 0..{stage.keep - 1}")
    if isinstance(rule, PruMerge) and (stage.keep < 2 or not 1 <= rule.neighbours <= model.visual_tokens):
        raise UserError(
            f"encoder: prumerge needs keep of at least 2 and 1..{model.visual_tokens} neighbours, not "
            f"{stage.keep} and {rule.neighbours}"
        )


def check_select(select: Select, live: int) -> None:
    """Budgets of a selection that `live` rows reach."""
    where = f"layer {select.layer}: select.keep"
    if select.keep < 1:
        raise UserError(f"{where}: {select.keep} is less than 1; use exit")
    if select.keep > live:
        raise UserError(f"{where}: budget {select.keep} grows from {live}")
    if select.keep > TENSORRT_TOPK_LIMIT:
        raise UserError(f"{where}: TensorRT's TopK takes at most {TENSORRT_TOPK_LIMIT}, not {select.keep}")


def check_row(row: Row, said: dict[str, Any], before: Row | None) -> None:
    """One layer's fields against each other."""
    where = f"layer {row.layer}"
    if row.execute == "none" and (extra := sorted(set(said) - {"execute"})):
        raise UserError(f"{where}: {extra[0]}: has no effect in a layer that is not executed")
    if row.execute == "decode" and (extra := sorted(set(said) - {"execute", "cache", "sublayers"})):
        raise UserError(f"{where}: {extra[0]}: has no effect in a layer that is not executed at prefill")
    if row.execute == "decode" and row.sublayers == "ffn":
        raise UserError(f"{where}: sublayers: a layer that runs at decode only needs its attention's cache")
    if row.sublayers == "ffn" and (
        extra := sorted({"query", "text_keys", "visual_keys", "cache"} & set(said))
    ):
        raise UserError(f"{where}: {extra[0]}: has no effect in a layer without attention")
    if row.sublayers == "attention" and "ffn" in said:
        raise UserError(f"{where}: ffn: has no effect in a layer without FFN")
    without_effect = sorted(
        f for f, v in said.items() if f != "execute" and v in {"none", "sink", "unskipped"} and not row.live
    )
    if without_effect:
        field = without_effect[0]
        raise UserError(
            f"{where}: {field}: {said[field]} has no effect, no visual rows are live in this layer"
        )
    if row.query == "none" and row.visual_keys == "none":
        raise UserError(f"{where}: visual_keys: none has no effect where query is none")
    for field in ("query", "ffn"):
        if getattr(row, field) == "unskipped" and not row.skipped:
            raise UserError(f"{where}: {field}: unskipped has no effect, no rows are in skip mode here")
    if row.select:
        _check_source(row, before, where)


def _check_source(row: Row, before: Row | None, where: str) -> None:
    """Whether there is an attention to rank by."""
    assert row.select
    source = reads(row.select.by)
    if source == "previous":
        if before is None or not before.live:
            raise UserError(
                f"{where}: select.by: no layer before it has seen the visual rows; rank by its own attention"
            )
        if not before.attends or before.execute == "decode" or before.text_keys != "live":
            raise UserError(
                f"{where}: select.by: layer {before.layer} has no attention from text to visual rows to rank "
                "by; rank by its own attention"
            )
        if before.selects_inside:
            raise UserError(f"{where}: select.by: layer {before.layer} selects inside; rank by another layer")
    if source == "own" and (not row.attends or row.execute == "decode"):
        raise UserError(f"{where}: select.by: own scores need the layer's attention to be executed")
    if source == "own" and row.text_keys != "live":
        raise UserError(
            f"{where}: select.by: own scores contradict text_keys {row.text_keys} in the same layer"
        )
    if row.selects_inside and (row.query, row.visual_keys, row.masked_by) != ("live", "live", None):
        raise UserError(f"{where}: select.by: cross_and_self_attention needs every visual row and key")


def check_skip(schedule: Schedule, decisions: Decisions) -> None:
    """Skip stages against budgets and selections."""
    if schedule.skip is None:
        return
    stages = schedule.skip.stages
    for earlier, later in itertools.pairwise(stages):
        if later.layer <= earlier.layer or later.count < earlier.count:
            raise UserError(
                f"layer {later.layer}: skip.stages: layers rise and counts do not fall, but layer "
                f"{earlier.layer} with {earlier.count} comes before"
            )
    for stage in stages:
        if not schedule.inject <= stage.layer < schedule.exit:
            raise UserError(
                f"layer {stage.layer}: skip.stages: visual rows are live in layers "
                f"{schedule.inject}..{schedule.exit - 1} only"
            )
        if not 1 <= stage.count <= schedule.rows[stage.layer].live:
            raise UserError(
                f"layer {stage.layer}: skip.stages: count {stage.count} is not within "
                f"1..{schedule.rows[stage.layer].live}"
            )
    for select in decisions.select:
        if select.layer >= stages[0].layer:
            raise UserError(
                f"layer {select.layer}: select: no selection at or after the first skip stage (layer "
                f"{stages[0].layer}), how many of the rows that skip would survive it is not fixed"
            )
    if not any("unskipped" in (row.query, row.ffn) for row in schedule.rows):
        raise UserError("skip: has no effect where no layer's query or ffn is unskipped")
