"""No pruning: the yardstick of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.profile import Decisions
from trimvlm.value import Value
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "dense"
SUMMARY = "every visual token in every layer, nothing skipped"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """None."""


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Decides nothing."""
    return Outcome(decisions=Decisions())
