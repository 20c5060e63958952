"""VTW: all visual tokens leave the decoder before layer K.

K is the first layer, searched upwards, where KL(dropped before K || full) at the last prompt row is at most
eta (VTW's code; mean over 20 samples). Position ids are kept and decode sees what each layer cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.profile import Decisions
from trimvlm.value import Value
from trimvlm_calib.outcome import Curve, Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "vtw"
SUMMARY = "visual tokens leave at the first layer where the prediction hardly changes (VTW)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published: K from 5 of 32 layers on; eta 0.003 (LLaVA-1.5-7B), 0.0005 (13B), 0.0001 (1.6-7B).

    Attributes:
        start: where the search starts, as a share of the depth, rounded to whole layers.
        eta: largest divergence in nats.
        exit: K as a share of the depth, instead of the search; at least layer 1.
    """

    start: float = 5 / 32
    eta: float = 0.003
    exit: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(f"start: {self.start} is not within 0 and 1 (excluded)")
        if self.eta <= 0:
            raise UserError(f"eta: {self.eta} is not positive")
        if self.exit is not None and not 0 < self.exit <= 1:
            raise UserError(f"exit: {self.exit} is not within 0 (excluded) and 1")


def at_share(share: float) -> Parameters:
    """Vision stays for `share` of the layers."""
    return Parameters(exit=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Exits at the first layer within eta, or where `exit` says.

    Raises:
        UserError: no layer is.
    """
    depth = probe.spec.layers
    first = max(1, round(parameters.start * depth))
    curve = exit_curve(probe, first)
    if parameters.exit is not None:
        layer = max(1, round(parameters.exit * depth))
        return Outcome(decisions=Decisions(exit=layer), curves={"kl_exit": curve})
    return Outcome(decisions=Decisions(exit=first_within(curve, parameters.eta)), curves={"kl_exit": curve})


def exit_curve(probe: Probe, first: int) -> Curve:
    """KL(all visual tokens dropped before layer K || full) for each K from `first` on."""
    candidates = {layer: Decisions(exit=layer) for layer in range(first, probe.spec.layers)}
    return probe.sweep("exit", candidates, "pruned||full")


def first_within(curve: Curve, eta: float) -> int:
    """First layer whose value is at most `eta`.

    Raises:
        UserError: there is none; the message gives the smallest value.
    """
    measured = {layer: value for layer, value in enumerate(curve) if value is not None}
    for layer, value in measured.items():
        if value <= eta:
            return layer
    layer = min(measured, key=lambda layer: measured[layer])
    raise UserError(
        f"eta: at no layer can the visual tokens leave within {eta} nats; the least is "
        f"{measured[layer]} at layer {layer}: give a larger eta"
    )
