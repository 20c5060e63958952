"""What a method decides, and how the outcomes of two methods become one (`fastv+v-skip`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from msgspec import structs

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, SkipMode, SkipStage
from trimvlm.router_spec import RouterSpec
from trimvlm.value import Value

Curve = tuple[float | None, ...]
T = TypeVar("T")

VISUAL_FIELDS = ("query", "text_keys", "visual_keys", "ffn", "cache")  # of a LayerRule, about visual rows


class TrainedRouter(Value, frozen=True, kw_only=True):
    """A router that is not on disk yet; see `RouterSpec`. `weights`: float32 arrays by parameter name."""

    width: int
    heads: int
    first: int
    mask: Literal["full", "causal"]
    weights: dict[str, Any]

    def named(self, file: str) -> RouterSpec:
        """The router as a Profile names it, with its weights in `file`."""
        from trimvlm_export.router_weights import digest

        return RouterSpec(
            weights=file,
            sha256=digest(self.weights),
            width=self.width,
            heads=self.heads,
            first=self.first,
            mask=self.mask,
        )


class Outcome(Value, frozen=True, kw_only=True):
    """Result of one calibration.

    Attributes:
        decisions: the static decisions.
        curves: what was measured, one value per layer.
        needs_adapted_weights: the method was published with fine-tuned weights only.
        counted_of: visual rows that the counts of `decisions.skip` are out of; where another method's encoder
            stage leaves fewer, the counts shrink in proportion.
        router: what was trained, for the decisions to rank by or to choose among `variants`.
        variants: decisions among which the runtime chooses for each input, `decisions` first; empty: none.
    """

    decisions: Decisions
    curves: dict[str, Curve] = {}
    needs_adapted_weights: bool = False
    counted_of: int | None = None
    router: TrainedRouter | None = None
    variants: tuple[Decisions, ...] = ()


def round_figure(value: float) -> float:
    """Six significant digits: what is written to a Profile is what decisions are made from."""
    return float(f"{value:.6g}")


def merge(outcomes: Mapping[str, Outcome]) -> Outcome:
    """Field-wise union of outcomes, keyed by method name.

    Whether the union can be is the Schedule's question; here only one value per field is asked for. What one
    method decides for visual rows in layers where another leaves none has nothing to act on, and is left out.

    Raises:
        UserError: two methods decide the same field differently.
    """
    decisions = {name: outcome.decisions for name, outcome in outcomes.items()}
    curves: dict[str, Curve] = {}
    for name, outcome in outcomes.items():
        for curve, values in outcome.curves.items():
            known = curves.setdefault(curve, values)
            if known != values:
                curves[f"{curve} ({name})"] = values
    encoder, inject = _one("encoder", decisions, None), _one("inject", decisions, 0)
    exit_ = _one("exit", decisions, None)
    counted_of = next((each.counted_of for each in outcomes.values() if each.counted_of), None)
    varied = next((name for name, each in outcomes.items() if each.variants), "")
    variants = outcomes[varied].variants if varied else ()
    return Outcome(
        decisions=Decisions(
            encoder=encoder,
            inject=inject,
            exit=exit_,
            select=tuple(select for each in decisions.values() for select in each.select),
            skip=_scaled(_one("skip", decisions, None), encoder, counted_of),
            layers=_layers(decisions, inject, exit_),
            positions=_one("positions", decisions, "persistent"),
            mask=_one("mask", decisions, "additive"),
        ),
        curves=curves,
        needs_adapted_weights=any(outcome.needs_adapted_weights for outcome in outcomes.values()),
        counted_of=counted_of,
        router=next((each.router for each in outcomes.values() if each.router), None),
        variants=tuple(
            merge({**outcomes, varied: Outcome(decisions=variant)}).decisions for variant in variants
        ),
    )


def _layers(decisions: Mapping[str, Decisions], inject: int, exit_: int | None) -> tuple[LayerRule, ...]:
    """All rules; those about visual rows for layers with visual rows, where methods are combined."""
    rules = [rule for each in decisions.values() for rule in each.layers]
    if len(decisions) == 1:
        return tuple(rules)
    found: list[LayerRule] = []
    for rule in rules:
        live = tuple(layer for layer in rule.layers if inject <= layer and (exit_ is None or layer < exit_))
        rest = tuple(layer for layer in rule.layers if layer not in live)
        whole = structs.replace(rule, layers=rest, **dict.fromkeys(VISUAL_FIELDS))
        found += [structs.replace(rule, layers=live)] if live else []
        found += [whole] if rest and (whole.execute or whole.sublayers) else []
    return tuple(found)


def _scaled(skip: SkipMode | None, encoder: EncoderStage | None, counted_of: int | None) -> SkipMode | None:
    """Skip counts for the rows that an encoder stage leaves, at least one."""
    if skip is None or encoder is None or counted_of is None:
        return skip
    share = encoder.keep / counted_of
    stages = tuple(
        SkipStage(layer=stage.layer, count=max(1, round(stage.count * share))) for stage in skip.stages
    )
    return structs.replace(skip, stages=stages)


def _one(field: str, decisions: Mapping[str, Decisions], default: T) -> T:
    """The value of `field` that some method decides, or the default."""
    said: dict[str, Any] = {
        name: getattr(each, field) for name, each in decisions.items() if getattr(each, field) != default
    }
    if any(value != next(iter(said.values())) for value in said.values()):
        both = " and ".join(f"{value} ({name})" for name, value in said.items())
        raise UserError(f"{field}: the methods disagree: {both}; combine other methods")
    return next(iter(said.values()), default)
