"""What the calibrators of encoder stages share: nothing is measured, published choices fit any tower.

Budgets are shares of the visual tokens or numbers of them; layers published for CLIP's 24 are shares of the
depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, EncoderStage, Tower, check_tower
from trimvlm.errors import UserError
from trimvlm.profile import Decisions
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe


def check_keep(keep: float) -> None:
    """Refuses what is neither a share within 0 (excluded) and 1 nor a number of tokens.

    Raises:
        UserError: naming the value.
    """
    if not keep > 0 or (keep > 1 and keep % 1 != 0):
        raise UserError(f"keep: {keep} is neither a share within 0 (excluded) and 1 nor a number of tokens")


def decide(
    probe: Probe, keep: float, rule_of: Callable[[int, Tower], EncoderRule], *, least: int = 1
) -> Outcome:
    """The outcome of an encoder stage.

    Args:
        keep: share of the visual tokens (up to 1) or their number.
        rule_of: (budget, tower) -> rule.
        least: smallest budget that a share may round to.

    Raises:
        UserError: the tower cannot serve the rule, or has fewer patches than `keep`.
    """
    tower, tokens = probe.tower, probe.spec.visual_tokens
    assert tower is not None, "the probe of a checkpoint knows its tower"
    budget = int(keep) if keep > 1 else min(tokens, max(least, round(keep * tokens)))
    if budget > tokens:
        raise UserError(f"keep: {budget} is more than the {tokens} visual tokens of an image")
    stage = EncoderStage(keep=budget, by=rule_of(budget, tower))
    check_tower(stage, tower, tokens)
    return Outcome(decisions=Decisions(encoder=stage))


def last_used(tower: Tower) -> int:
    """Number of the last layer that the projector's features come through."""
    return max(0, max(tower.features) - 1)


def second_last(tower: Tower) -> int:
    """Layer -2, as papers on CLIP say it."""
    return max(0, tower.layers - 2)
