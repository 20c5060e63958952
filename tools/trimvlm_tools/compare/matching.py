"""Which parameters bring a method to a share of the dense model's FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import msgspec

from trimvlm.accounting import mac2, router_flops, selection_flops
from trimvlm.errors import UserError
from trimvlm.profile import Decisions
from trimvlm.schedule import resolve
from trimvlm.value import Value
from trimvlm_calib.methods import find
from trimvlm_calib.outcome import Curve, Outcome, merge
from trimvlm_calib.probe import Probe

TOLERANCE = 0.03  # farther from the target than this share of the dense FLOPs is no match
GRID, REFINEMENTS = 8, 8  # shares that are tried, then halvings around the best of them


class LazyCurve(Sequence[float | None]):
    """A curve that is measured when somebody reads it. Methods that only report a curve leave it unread, so a
    search over their parameters measures nothing."""

    def __init__(self, measure: Callable[[], Curve]) -> None:
        self._measure = measure
        self._values: Curve | None = None

    @overload
    def __getitem__(self, index: int) -> float | None: ...
    @overload
    def __getitem__(self, index: slice) -> Curve: ...
    def __getitem__(self, index: int | slice) -> float | Curve | None:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    @property
    def known(self) -> bool:
        """Whether somebody has read it."""
        return self._values is not None

    def _read(self) -> Curve:
        if self._values is None:
            self._values = self._measure()
        return self._values


class LazyProbe:
    """A Probe whose `sweep` is lazy."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._probe, name)

    def sweep(self, *arguments: Any) -> LazyCurve:
        """See `Probe.sweep`."""
        scope = self._probe.scope

        def measure() -> Curve:
            self._probe.scope = scope
            return self._probe.sweep(*arguments)

        return LazyCurve(measure)


class Matched(Value, frozen=True, kw_only=True):
    """A method at a target.

    Attributes:
        parameters: by method, every parameter that was used.
        flops_ratio: MAC2 of the prefill over the dense model's, scoring included.
    """

    outcome: Outcome
    parameters: dict[str, dict[str, Any]]
    flops_ratio: float


def flops_ratio(outcome: Outcome, probe: Probe, text: int) -> float:
    """MAC2 of the decoder's prefill over the dense model's, for one image and `text` text rows; what ranks
    tokens is counted, a router too."""
    schedule, dense = resolve(outcome.decisions, probe.spec), resolve(Decisions(), probe.spec)
    router = outcome.router.named("router") if outcome.router else None
    ranking = selection_flops(schedule, text) + router_flops(router, schedule, text)
    return (mac2(schedule, text) + ranking) / mac2(dense, text)


def is_adjustable(expression: str) -> bool:
    """Whether some method of `a+b` has `at_share`: others run as their calibration decides."""
    return any(hasattr(method, "at_share") for method in find(expression).values())


def as_published(
    expression: str, probe: Probe, text: int, overrides: Mapping[str, Mapping[str, Any]]
) -> Matched:
    """The methods with their default parameters."""
    return _at(expression, probe, None, text, overrides)


def match(
    expression: str,
    probe: Probe,
    target: float,
    text: int,
    overrides: Mapping[str, Mapping[str, Any]],
) -> Matched:
    """Searches the methods' `at_share` for the FLOPs nearest to `target`.

    `at_share(share)` of a method module gives parameters with which the method leaves about that share, 0 to
    1, of what it can save; the FLOPs rise with it.

    Args:
        expression: a method, or several as in `fastv+v-skip`.
        target: share of the dense model's FLOPs, 0..1.
        overrides: by method, parameters that are not the published ones.

    Raises:
        UserError: no share comes within `TOLERANCE` of the target; the message gives the nearest.
    """
    found: dict[float, Matched] = {}
    reasons: list[str] = []

    def look(share: float) -> None:
        try:
            found[share] = _at(expression, probe, share, text, overrides)
        except UserError as error:  # too much or too little for this model
            reasons.append(str(error))

    def nearest() -> float:
        return min(found, key=lambda share: (abs(found[share].flops_ratio - target), -share))

    for number in range(1, GRID + 1):
        look(number / GRID)
    if not found:
        raise UserError(f"{expression}: {reasons[-1]}")
    step = 1 / GRID
    for _ in range(REFINEMENTS):
        step /= 2
        middle = nearest()
        look(middle - step if found[middle].flops_ratio > target else min(middle + step, 1.0))
    best = found[nearest()]
    if abs(best.flops_ratio - target) > TOLERANCE:
        raise UserError(
            f"{expression}: {target:.0%} of the dense FLOPs is out of reach, the nearest is "
            f"{best.flops_ratio:.1%}"
        )
    return best


def measured_curves(outcome: Outcome) -> dict[str, Curve]:
    """The curves that decided something; what a method only reports is not measured for a comparison."""
    return {
        name: tuple(curve)
        for name, curve in outcome.curves.items()
        if not isinstance(curve, LazyCurve) or curve.known
    }


def _at(
    expression: str, probe: Probe, share: float | None, text: int, overrides: Mapping[str, Mapping[str, Any]]
) -> Matched:
    outcomes, used = {}, {}
    for name, method in find(expression).items():
        at_share = getattr(method, "at_share", None)
        settings = method.Parameters() if share is None or at_share is None else at_share(share)
        settings = msgspec.structs.replace(settings, **overrides.get(name, {}))
        probe.scope = f"{name} {settings}"
        outcomes[name] = method.calibrate(cast(Probe, LazyProbe(probe)), settings)
        used[name] = msgspec.to_builtins(settings)
    outcome = merge(outcomes)
    return Matched(outcome=outcome, parameters=used, flops_ratio=flops_ratio(outcome, probe, text))
