"""What calibrators may ask of a model: divergences of its next-token distribution, and views inside.

Everything is measured at the last prompt row of single prompts under the reference, in nats, and averaged
over the calibration samples. Figures are kept per sample: a run that was killed goes on where it stopped
(`partial.py`), and several processes share the samples (`distributed.py`).

The loop over samples is the outer one, so that candidates can start from the dense model's residual streams
(`prefix.py`), and one sample's streams are held at a time.

Shapes: L layers, B samples, V vocabulary, N visual rows, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from trimvlm.encoder_rules import Tower
from trimvlm.profile import Decisions, ModelSpec
from trimvlm.schedule import resolve
from trimvlm_calib.distances import Distance, distance_of, mean_cosine
from trimvlm_calib.distributed import ALONE, Team
from trimvlm_calib.outcome import Curve, round_figure
from trimvlm_calib.partial import Partial, key_of
from trimvlm_calib.prefix import first_change, pays_off
from trimvlm_calib.samples import RECENT
from trimvlm_export.reference import Reference
from trimvlm_export.reference_record import Prefill

Progress = Callable[[str, int, int], None]
View = Callable[[Prefill, Mapping[str, Any]], Any]


class Probe:
    """A model and its calibration samples.

    Args:
        model: the Hugging Face model, in evaluation mode; None where nothing is measured.
        spec: its geometry.
        inputs: per sample, what its processor gives (one image each).
        progress: called as `progress(what, done, total)` after every measurement of a sample.
        partial: measurements of an earlier run that was killed.
        team: processes that share the samples.
        tower: the vision tower's geometry, for methods that decide an encoder stage.

    Attributes:
        scope: whose measurements `measure` makes: a method and its parameters.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        inputs: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        partial: Partial | None = None,
        team: Team = ALONE,
        tower: Tower | None = None,
    ) -> None:
        self.spec = spec
        self.tower = tower
        self.inputs = inputs
        self.scope = ""
        self._model = model
        self._progress = progress or (lambda what, done, total: None)
        self._partial = partial or Partial()
        self._team = team
        self._features = lru_cache(RECENT)(self._project)
        self._dense: dict[int, np.ndarray] = {}  # logits [V]

    @property
    def model(self) -> Any:
        """The Hugging Face model; None where nothing is measured (a method with `SAMPLES` 0)."""
        return self._model

    def tell(self, what: str, done: int, total: int) -> None:
        """Reports progress of work that a method does itself."""
        self._progress(what, done, total)

    def runs(self, decisions: Decisions, what: str, *, detail: bool = False) -> Iterator[Prefill]:
        """One prefill per sample under `decisions`, in every process; `measure` resumes and shares."""
        for sample in range(len(self.inputs)):
            run = self._prefill(decisions, sample, detail=detail)
            self._progress(what, sample + 1, len(self.inputs))
            yield run

    def measure(self, what: str, decisions: Decisions, view: View, *, detail: bool = False) -> np.ndarray:
        """Figures float64 [B, K] that `view` takes from each sample's prefill under `decisions`.

        Args:
            what: names the measurement; within one method the same name means the same view.
            view: called as `view(prefill, inputs)`; gives K figures (or a single one), K the same for all.
            detail: whether the view reads `hidden` or `kv`.
        """
        return self._view(what, key_of("view", what, self.scope, decisions), decisions, view, detail)

    def _view(self, what: str, key: str, decisions: Decisions, view: View, detail: bool) -> np.ndarray:
        def run(sample: int, missing: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
            for each in missing:
                prefill = self._prefill(decisions, sample, detail=detail)
                yield each, np.atleast_1d(view(prefill, self.inputs[sample]))

        return np.array(self._collect(what, {key: what}, run)[key])

    def divergence(self, decisions: Decisions, distance: Distance, what: str) -> float:
        """Mean distance between the dense model and the model under `decisions`, as `divergences`."""
        return self.divergences(what, {0: decisions}, distance)[0]

    def divergences(
        self, what: str, candidates: Mapping[int, Decisions], distance: Distance
    ) -> dict[int, float]:
        """Mean distance of each candidate from the dense model.

        Args:
            candidates: decisions by number, most often a layer's.
            distance: see `distances.distance_of`.
        """
        keys = {number: key_of("distance", distance, each) for number, each in candidates.items()}
        decisions = {keys[number]: each for number, each in candidates.items()}
        starts = {keys[number]: first_change(each, self.spec) for number, each in candidates.items()}
        names = {keys[number]: f"{what} {number}" for number in candidates}

        def run(sample: int, missing: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
            hidden = self._prefix(sample, [starts[key] for key in missing])
            for key in missing:
                resume = (starts[key], hidden[starts[key]]) if hidden else None
                logits_V = self._prefill(decisions[key], sample, resume=resume).logits
                yield key, [distance_of(self._dense[sample], logits_V, distance)]

        figures = self._collect(what, names, run)
        return {number: float(np.mean([each[0] for each in figures[keys[number]]])) for number in candidates}

    def sweep(self, what: str, candidates: Mapping[int, Decisions], distance: Distance) -> Curve:
        """`divergences` as a curve over the layers; None where there is no candidate."""
        measured = self.divergences(what, candidates, distance)
        return tuple(
            round_figure(measured[layer]) if layer in measured else None for layer in range(self.spec.layers)
        )

    def visual_similarity(self) -> Curve:
        """Per layer l, the mean cosine between visual rows of h_l and h_{l+1} in the dense model.

        HiDivDrop, section 2: intra-modal similarity; low where a layer changes the visual rows much.
        """

        def view(run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
            states = [hidden[self.visual_rows(inputs)] for hidden in run.hidden]
            return [mean_cosine(states[layer], states[layer + 1]) for layer in range(self.spec.layers)]

        return self._dense_curve("similarity", view)

    def sublayer_similarity(self, sublayer: Literal["attention", "ffn"]) -> Curve:
        """Per layer, the mean cosine between visual rows before and after a sub-layer of the dense model."""
        middle: list[np.ndarray] = []  # between attention and FFN, per layer [S, D]

        def note(module: Any, args: tuple) -> None:
            middle.append(args[0][0].float().cpu().numpy())

        def view(run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
            rows = self.visual_rows(inputs)
            between, outside = [m[rows] for m in middle], [h[rows] for h in run.hidden]
            middle.clear()
            edge = outside[:-1] if sublayer == "attention" else outside[1:]
            return [mean_cosine(a, b) for a, b in zip(edge, between, strict=True)]

        layers = self._model.model.language_model.layers
        hooks = [layer.post_attention_layernorm.register_forward_pre_hook(note) for layer in layers]
        try:
            return self._dense_curve(f"{sublayer} similarity", view)
        finally:
            for hook in hooks:
                hook.remove()

    def visual_rows(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Rows int64 [N] of a sample's prompt that hold visual tokens, ascending."""
        return np.flatnonzero(inputs["input_ids"][0].cpu().numpy() == self._model.config.image_token_id)

    def _dense_curve(self, what: str, view: View) -> Curve:
        """Mean over samples of L figures of the dense model, which depend on no method's parameters."""
        figures_BL = self._view(what, key_of("dense", what), Decisions(), view, True)
        return tuple(round_figure(float(value)) for value in figures_BL.mean(axis=0))

    def _collect(
        self,
        what: str,
        names: Mapping[str, str],
        run: Callable[[int, Mapping[str, str]], Iterator[tuple[str, Any]]],
    ) -> dict[str, list[tuple[float, ...]]]:
        """Figures of every key, sample after sample; what is not known yet is run, by this process or others.

        Args:
            names: key to what people call it.
            run: yields (key, figures) for the missing keys of a sample.
        """
        mine = self._team.mine(len(self.inputs))
        total = len(mine) * len(names)
        done = sum(self._partial.get(key, sample) is not None for sample in mine for key in names)
        for sample in mine:
            missing = {key: name for key, name in names.items() if self._partial.get(key, sample) is None}
            for key, figures in run(sample, missing) if missing else ():
                self._partial.put(key, sample, names[key], figures)
                done += 1
                self._progress(what, done, total)
        everybody = self._team.gather(
            {(key, sample): self._partial.get(key, sample) for sample in mine for key in names}
        )
        return {key: [everybody[key, sample] or () for sample in range(len(self.inputs))] for key in names}

    def _prefix(self, sample: int, starts: Sequence[int]) -> list[np.ndarray] | None:
        """Runs the dense model where it is needed: for its logits, or to start at layers `starts`.

        Returns:
            Its residual streams, or None where running the candidates whole is as cheap.
        """
        reuse = pays_off(starts, self.spec.layers, dense_known=sample in self._dense)
        if not reuse and sample in self._dense:
            return None
        run = self._prefill(Decisions(), sample, detail=reuse)
        self._dense[sample] = run.logits
        return run.hidden if reuse else None

    def _prefill(
        self,
        decisions: Decisions,
        sample: int,
        *,
        detail: bool = False,
        resume: tuple[int, np.ndarray] | None = None,
    ) -> Prefill:
        schedule, encoder = resolve(decisions, self.spec), decisions.encoder
        features = self._features(sample) if encoder is None else None
        with Reference(self._model, schedule, encoder) as reference:  # not longer: it holds the model
            return reference.prefill(self.inputs[sample], features=features, resume=resume, detail=detail)

    def _project(self, sample: int) -> Any:
        return Reference(self._model, resolve(Decisions(), self.spec)).features(self.inputs[sample])
