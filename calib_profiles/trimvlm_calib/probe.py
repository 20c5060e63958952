"""What calibrators may ask of a model: divergences of its next-token distribution, and views inside.

Everything is measured at the last prompt row of single prompts under the reference, in nats, and averaged
over the calibration samples.

Shapes: L layers, B samples, V vocabulary, N visual rows, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from trimvlm.profile import Decisions, ModelSpec
from trimvlm.schedule import resolve
from trimvlm_calib.outcome import Curve, round_figure
from trimvlm_export.reference import Reference
from trimvlm_export.reference_prompt import Prefill

Progress = Callable[[str, int, int], None]
Direction = Literal["full||pruned", "pruned||full"]


class Probe:
    """A model and its calibration samples.

    Args:
        model: the Hugging Face model, in evaluation mode.
        spec: its geometry.
        inputs: per sample, what its processor gives (one image each).
        progress: called as `progress(what, done, total)` after every prefill.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        inputs: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self._model = model
        self._progress = progress or (lambda what, done, total: None)

    def runs(self, decisions: Decisions, what: str, *, detail: bool = False) -> Iterator[Prefill]:
        """One prefill per sample under `decisions`."""
        schedule = resolve(decisions, self.spec)
        for done, (inputs, features) in enumerate(zip(self.inputs, self._features, strict=True), start=1):
            with Reference(self._model, schedule) as reference:  # not across a yield: it holds the model
                run = reference.prefill(inputs, features=features, detail=detail)
            self._progress(what, done, len(self.inputs))
            yield run

    def divergence(self, decisions: Decisions, direction: Direction, what: str) -> float:
        """Mean KL divergence in nats between the dense model and the model under `decisions`."""
        full, pruned = self._dense, self._log_probs(decisions, what)
        p, q = (full, pruned) if direction == "full||pruned" else (pruned, full)
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())

    def sweep(self, what: str, candidates: Mapping[int, Decisions], direction: Direction) -> Curve:
        """The divergence of each candidate, as a curve over the layers; None where there is no candidate."""
        measured = {
            layer: round_figure(self.divergence(decisions, direction, f"{what}, layer {layer}"))
            for layer, decisions in candidates.items()
        }
        return tuple(measured.get(layer) for layer in range(self.spec.layers))

    def visual_similarity(self) -> Curve:
        """Per layer l, the mean cosine between visual rows of h_l and h_{l+1} in the dense model.

        HiDivDrop, section 2: intra-modal similarity; low where a layer changes the visual rows much.
        """
        total_L = np.zeros(self.spec.layers)
        for run, inputs in zip(self.runs(Decisions(), "similarity", detail=True), self.inputs, strict=True):
            visual = self._visual(inputs)
            for layer in range(self.spec.layers):
                before, after = (h[visual].astype(np.float64) for h in run.hidden[layer : layer + 2])
                norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
                total_L[layer] += ((before * after).sum(axis=1) / norms).mean()
        return tuple(round_figure(value) for value in total_L / len(self.inputs))

    def visual_attention(self, decisions: Decisions) -> Iterator[np.ndarray]:
        """Per sample, attention [L, H, N] of the last row to the visual rows under `decisions`."""
        for run, inputs in zip(self.runs(decisions, "attention"), self.inputs, strict=True):
            yield np.stack(run.last_row)[:, :, self._visual(inputs)]

    def _visual(self, inputs: Mapping[str, Any]) -> np.ndarray:
        return np.flatnonzero(inputs["input_ids"][0].cpu().numpy() == self._model.config.image_token_id)

    def _log_probs(self, decisions: Decisions, what: str) -> np.ndarray:
        """Log-probabilities float64 [B, V] of the token after the prompt."""
        logits_BV = np.stack([run.logits for run in self.runs(decisions, what)]).astype(np.float64)
        logits_BV -= logits_BV.max(axis=1, keepdims=True)
        return logits_BV - np.log(np.exp(logits_BV).sum(axis=1, keepdims=True))

    @cached_property
    def _dense(self) -> np.ndarray:
        return self._log_probs(Decisions(), "dense")

    @cached_property
    def _features(self) -> list[Any]:
        reference = Reference(self._model, resolve(Decisions(), self.spec))
        return [reference.features(inputs) for inputs in self.inputs]

    @property
    def model(self) -> Any:
        """The Hugging Face model; None where nothing is measured (a method with `SAMPLES` 0)."""
        return self._model

    def visual_rows(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Rows int64 [N] of a sample's prompt that hold visual tokens, ascending."""
        return self._visual(inputs)
