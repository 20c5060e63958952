"""ShortGPT: whole layers are removed where they change their input least.

Block influence BI(l) = 1 - cos(h_l, h_{l+1}), mean over all rows of all samples, text and visual alike; the
layers of lowest BI go. h_{l+1} of the last layer is its plain output: transformers' `hidden_states[-1]` is
taken after the final norm, which inflates the last layer's BI in the released code.

The released variant for generation skips the layers at prefill only, still writing keys and values from the
unchanged rows, and runs every layer at decode: `generation`. The paper measures on text (PG19); here the
samples are the prompts that the model is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.depth import check_share
from trimvlm_calib.methods.v_skip import MINIMUM, lowest
from trimvlm_calib.outcome import Curve, Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe
    from trimvlm_export.reference_record import Prefill

NAME = "shortgpt"
SUMMARY = "whole layers removed by lowest block influence (ShortGPT, section 3)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """8 of 32 layers, as in Pruning All-Rounder's comparison (its row with 24 layers).

    Attributes:
        share: share of the layers to remove, rounded to whole layers, at least one.
        generation: skip them at prefill only.
    """

    share: float = 8 / 32
    generation: bool = False

    def __post_init__(self) -> None:
        check_share("share", self.share)


def at_share(share: float) -> Parameters:
    """Keeps `share` of them."""
    return Parameters(share=max(1 - share, MINIMUM))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Removes the layers with the lowest block influence; of equal ones the lower layer."""
    influence = block_influence(probe)
    layers = tuple(lowest(influence, parameters.share))
    rule = LayerRule(layers=layers, execute="decode" if parameters.generation else "none")
    return Outcome(decisions=Decisions(layers=(rule,)), curves={"block_influence": influence})


def block_influence(probe: Probe) -> Curve:
    """Per layer, the mean over all rows of 1 - cos between a row before and after it, in the dense model."""

    def view(run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
        sums = []
        for layer in range(probe.spec.layers):
            before, after = (h.astype(np.float64) for h in run.hidden[layer : layer + 2])
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            sums.append(float((1 - (before * after).sum(axis=1) / norms).sum()))
        return [len(run.hidden[0]), *sums]

    figures = probe.measure("block influence", Decisions(), view, detail=True).sum(axis=0)
    return tuple(round_figure(float(total / figures[0])) for total in figures[1:])
