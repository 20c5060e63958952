"""PAR's actions on the calibration samples: what they are, what they cost, what the router sees of a sample.

Shapes: N visual rows, R layers that may be left out, B samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import RouterScores
from trimvlm.schedule import resolve
from trimvlm_calib.distances import distance_of
from trimvlm_calib.prefix import first_change
from trimvlm_calib.probe import Probe
from trimvlm_calib.router_training import Actions, RouterInputs, draw_actions, router_inputs
from trimvlm_calib.samples import RECENT
from trimvlm_export.reference import Reference
from trimvlm_export.reference_record import Prefill
from trimvlm_export.router import Router

if TYPE_CHECKING:
    from trimvlm_calib.methods.par import Parameters


class RouterPlan:
    """What the parameters mean for the model at hand."""

    def __init__(self, probe: Probe, parameters: Parameters) -> None:
        self.probe, self.parameters, spec = probe, parameters, probe.spec
        self.tokens = spec.visual_tokens
        self.keeps = None if parameters.what == "layers" else max(1, round(parameters.keep * self.tokens))
        candidates = max(1, round(parameters.candidates * spec.layers))
        self.first = spec.layers - candidates
        self.skip = 0 if parameters.what == "tokens" else max(1, round(parameters.skip * spec.layers))
        if self.skip >= candidates:
            raise UserError(
                f"skip: {self.skip} layers cannot be chosen among the last {candidates}; raise candidates"
            )
        if not 0 <= parameters.layer < spec.layers:
            raise UserError(f"layer: {parameters.layer} is not within 0..{spec.layers - 1}")
        self.router_inputs = lru_cache(RECENT)(self._router_inputs)

    def router_shape(self) -> dict[str, Any]:
        width = self.parameters.width or min(self.probe.spec.hidden, 1024)
        heads = next((h for h in range(max(1, width // 64), 0, -1) if width % (2 * h) == 0), 1)
        return {"width": width, "heads": heads, "first": self.first, "mask": self.parameters.mask}

    def decisions(self, left_out: list[int]) -> Decisions:
        select = ()
        if self.keeps is not None:
            select = (Select(layer=self.parameters.layer, keep=self.keeps, by=RouterScores()),)
        layers = (LayerRule(layers=tuple(left_out), execute="none"),) if left_out else ()
        return Decisions(select=select, layers=layers)

    def actions(self, inputs: Mapping[str, Any], scores_N: np.ndarray) -> Actions:
        """The same for the same sample, in whatever order and process it comes."""
        content = hashlib.sha256()
        for name in ("input_ids", "pixel_values"):
            content.update(np.ascontiguousarray(inputs[name].cpu().numpy()).tobytes())
        known = int.from_bytes(content.digest()[:8], "little")
        return draw_actions(
            np.random.default_rng([self.parameters.seed, known]),
            scores_N,
            count=self.parameters.actions,
            keep=self.tokens if self.keeps is None else self.keeps,
            noise=self.parameters.noise * self.tokens,
            layers=self.probe.spec.layers - self.first,
            skip=self.skip,
        )

    def view(self, run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
        """FastV's scores of the tokens, then each action's divergence from the dense run."""
        ranking = run.last_row[max(self.parameters.layer, 1) - 1]
        scores_N = ranking[:, self.probe.visual_rows(inputs)].mean(axis=0, dtype=np.float32)
        actions, figures = self.actions(inputs, scores_N), scores_N.tolist()
        model, spec = self.probe.model, self.probe.spec
        features = Reference(model, resolve(Decisions(), spec)).features(inputs)
        for preference, executed in zip(actions.preference, actions.layers, strict=True):
            decisions = self.decisions((self.first + np.flatnonzero(~executed)).tolist())
            start = first_change(decisions, spec)
            with Reference(model, resolve(decisions, spec)) as reference:
                pruned = reference.prefill(
                    inputs,
                    features=features,
                    router_scores=None if self.keeps is None else preference,
                    resume=(start, run.hidden[start]),
                    detail=False,
                )
            figures.append(distance_of(run.logits, pruned.logits, "full||pruned"))
        return figures

    def layer_scores(self, router: Router) -> np.ndarray:
        """float64 [B, R]."""
        with torch.no_grad():
            scores = [router(*self.router_inputs(n))[1].cpu().numpy() for n in range(len(self.probe.inputs))]
        return np.array(scores, np.float64)

    def _router_inputs(self, sample: int) -> RouterInputs:
        inputs, model = self.probe.inputs[sample], self.probe.model
        features = Reference(model, resolve(Decisions(), self.probe.spec)).features(inputs)
        return router_inputs(model, inputs, features)
