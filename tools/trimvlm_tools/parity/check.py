"""The parity ladder for one profile of a bundle: dense HF -> reference -> graph -> engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np

from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage
from trimvlm.images import pixel_std
from trimvlm.opening import ORT_CPU
from trimvlm.parity import Metric, ParityReport, Rung
from trimvlm.profile import Decisions, Grid
from trimvlm.schedule import Schedule, resolve
from trimvlm.session import Session
from trimvlm_calib.samples import Sample, model_inputs
from trimvlm_tools.parity.answer import Answer
from trimvlm_tools.parity.choices import thresholds_of
from trimvlm_tools.parity.compare import LIMITS, Worst, kl, max_abs
from trimvlm_tools.parity.goldens import write_goldens
from trimvlm_tools.parity.quantized import Codes, quantized, take_codes
from trimvlm_tools.parity.rounded import runnable
from trimvlm_tools.parity.router import Score, make_router


def check(
    bundle: Bundle,
    profile: str | None,
    questions: Sequence[Sample],
    *,
    data: str,
    max_new_tokens: int = 16,
    advance: Callable[[str], None] = lambda step: None,
    goldens: int = 0,
    hf: HuggingFace | None = None,
    target: str = ORT_CPU,
) -> ParityReport:
    """Climbs the ladder.

    Args:
        bundle: with the checkpoint inside, as export writes it.
        profile: which profile; None where there is one.
        questions: asked on every rung.
        data: their name, for the report.
        max_new_tokens: length of the greedy answers, and of what is teacher-forced.
        advance: called after each question.
        hf: the bundle's checkpoint, where it is loaded already.
        goldens: so many of the questions are kept in the bundle as goldens, if the verdict is PASS.
        target: that runs the graph; with quantised weights the reference computes with the values that the
            codes stand for, and `hf` must be for the same.

    Returns:
        The report; its `verdict` is the gate.
    """
    name, entry = bundle.entry(profile)
    manifest = bundle.manifest
    pruning = bundle.profile(name)
    schedule, stage = Schedule.resolve(pruning, entry.model), pruning.decisions.encoder
    dense = resolve(Decisions(), entry.model)
    codes = quantized(entry, target)
    hf = hf or HuggingFace(bundle, entry.model.grid, codes)
    router = make_router(bundle, pruning, hf.model)
    limits = LIMITS["int8 activations" if any(c.activations == "int8" for c in codes) else manifest.dtype]
    plain = Worst(LIMITS["float32"])
    free, forced = (Worst(limits, thresholds_of(schedule)) for _ in range(2))
    chooses = bool(schedule.stages or schedule.skip_stages or stage)
    effect_kl, effect_tokens, pixels = [], 0, 0.0
    kept: list[tuple[Sample, Answer]] = []
    with runnable(bundle) as graphs, Session.open(graphs, name, target) as session:
        for question in questions:
            inputs = hf.inputs(question)
            untouched, dense_answer = hf.dense(question, dense, max_new_tokens)
            plain.add(replace(dense_answer, kv=[]), untouched)
            wanted = dense_answer
            if pruning.decisions != Decisions():
                wanted = hf.reference(inputs, schedule, max_new_tokens, encoder=stage, router=router)
            effect_kl.append(kl(dense_answer.logits[:1], wanted.logits[:1]))
            effect_tokens += wanted.tokens != dense_answer.tokens
            image = session.preprocess(question.image)
            std = pixel_std(manifest.image)
            theirs = inputs["pixel_values"].numpy().reshape(image.shape)
            pixels = max(pixels, max_abs(image * std, theirs * std))
            found = graph_answer(session, question, image, wanted)
            if stage and not all(map(np.array_equal, found.patches, wanted.patches)):
                wanted = replace(wanted, patches_tie=hf.patches_tie(inputs, stage, limits.tower_noise))
            free.add(found, wanted)
            if chooses:
                forced.add(graph_answer(session, question, image, wanted, force=True), wanted)
            if len(kept) < goldens:
                kept.append((question, wanted))
            advance("")
    effect = (
        Metric(name="pruning: mean KL of the first token (nats)", value=float(np.mean(effect_kl))),
        Metric(name="pruning: share of answers changed", value=effect_tokens / len(questions)),
    )
    pixel_metric = Metric(name="pixels max abs (of 0..1)", value=pixels, limit=1 / 255)
    graph = "graph" if graphs is bundle else "graph, rounded after every operator"
    graph = f"{graph} of {target}" if target != ORT_CPU else graph
    rungs = [
        Rung(name="dense HF -> reference, nothing pruned", metrics=plain.metrics()),
        Rung(name=f"reference -> {graph}, free running", metrics=(pixel_metric, *free.metrics())),
        Rung(name=f"reference -> {graph}, forced indices", metrics=forced.metrics())
        if chooses
        else Rung(name=f"reference -> {graph}, forced indices", skipped="this profile selects nothing"),
        Rung(name="effect of pruning: dense -> reference", metrics=effect),
        *(
            Rung(name=f"graph -> engine {target}", skipped="no device of that kind here")
            for target, engine in sorted(entry.engines.items())
            if engine.backend != "onnxruntime"
        ),
    ]
    if not any(rung.name.startswith("graph -> engine") for rung in rungs):
        rungs.append(Rung(name="graph -> engine", skipped="no engine was built"))
    report = ParityReport(
        profile=name,
        dtype=manifest.dtype,
        samples=len(questions),
        data=data,
        versions={package: version(package) for package in ("torch", "transformers", "onnxruntime", "numpy")},
        rungs=tuple(rungs),
    )
    if goldens and report.verdict == "PASS":
        write_goldens(bundle, name, kept, report)
    return report


class HuggingFace:
    """The checkpoint inside a bundle, loaded in float32 by transformers, for images of one grid; with `codes`
    its matrices are what quantised weights stand for."""

    def __init__(self, bundle: Bundle, grid: Grid | None = None, codes: Sequence[Codes] = ()) -> None:
        from trimvlm_export.loading import Preparation, load_model

        directory = bundle.path(bundle.manifest.weights[0]).parent
        self.prepare = Preparation(directory, grid)
        self.model: Any = load_model(directory)
        if codes:
            take_codes(self.model, bundle, codes)
        self._dense: dict[Any, tuple[Answer, Answer]] = {}

    def dense(self, question: Sample, dense: Schedule, max_new_tokens: int) -> tuple[Answer, Answer]:
        """Plain `generate` and the reference with nothing pruned; the same for every profile, so kept."""
        key = (question.image, question.question, max_new_tokens)
        if key not in self._dense:
            inputs = self.inputs(question)
            plain = self.generate(inputs, max_new_tokens)
            self._dense[key] = plain, self.reference(inputs, dense, max_new_tokens)
        return self._dense[key]

    def inputs(self, question: Sample) -> dict[str, Any]:
        """What the processor makes of a question."""
        return model_inputs(question, self.prepare)

    def generate(self, inputs: dict[str, Any], max_new_tokens: int) -> Answer:
        """Plain greedy `generate` of the untouched model."""
        import torch

        from trimvlm_export.reference import image_features

        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
            features = image_features(self.model, inputs)
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logits = np.stack([step[0].float().numpy() for step in out.logits])
        return Answer(
            visual=features.numpy(),
            logits=logits,
            tokens=tokens,
        )

    def patches_tie(self, inputs: dict[str, Any], stage: EncoderStage, noise: float) -> bool:
        """Whether rounding decides which patches a stage chooses; `noise` is a share, see `Limits`."""
        from trimvlm_export.reference_encoder import hangs_on_rounding

        return hangs_on_rounding(self.model, inputs, stage, noise)

    def reference(
        self,
        inputs: dict[str, Any],
        schedule: Schedule,
        max_new_tokens: int,
        *,
        encoder: EncoderStage | None = None,
        router: Score | None = None,
    ) -> Answer:
        """The same model under a Schedule; teacher-forced on its own greedy answer."""
        from trimvlm_export.reference import Reference

        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        with Reference(self.model, schedule, encoder) as reference:
            visual, patches = reference.encode(inputs)
            scores = router(inputs, visual) if router else None
            run = reference.prefill(inputs, features=visual, patches=patches, router_scores=scores)
            logits, tokens = [run.logits], [int(run.logits.argmax())]
            while tokens[-1] not in ends and len(tokens) < max_new_tokens:
                logits.append(reference.step(tokens[-1]))
                tokens.append(int(logits[-1].argmax()))
        return Answer(
            visual=visual.numpy(),
            patches=patches,
            selected=run.selected,
            scores=run.scores,
            skipped=run.skipped,
            skip_scores=run.skip_scores,
            visible=run.visible,
            logits=np.stack(logits),
            kv=[pair for pair in run.kv if pair is not None],
            tokens=tokens,
        )


def graph_answer(
    session: Session, question: Sample, image: np.ndarray, wanted: Answer, *, force: bool = False
) -> Answer:
    """The exported graphs on a question: logits teacher-forced on `wanted.tokens`, tokens of its own.

    Args:
        image: pixels from the session's preprocessing.
        force: the graph is given the choices of `wanted`, and its visual rows if an encoder stage chose them.
    """
    rows = session.prompt(question.question, 1)
    if force and wanted.patches:
        visual, patches, fed = wanted.visual, wanted.patches, wanted.visual
    else:
        seen = session.visual([image])
        visual, patches, fed = seen.rows, list(seen.chosen), seen.rows
    given, skips = (wanted.selected, wanted.skipped) if force else ((), ())
    first = outputs = session.prefill(rows, fed, given, patches=patches, forced_skip=skips)
    logits = [first["logits"][0]]
    for token in wanted.tokens[:-1]:
        outputs = session.step(token, outputs)
        logits.append(outputs["logits"][0])
    # Greedy decoding follows the teacher for as long as it agrees with it; from there it goes its own way.
    tokens: list[int] = []
    for row in logits:
        tokens.append(int(row.argmax()))
        if tokens != wanted.tokens[: len(tokens)]:
            break
    return Answer(
        visual=visual,
        patches=patches,
        selected=[*numbered(first, "selected").values()],
        scores=[*numbered(first, "scores").values()],
        skipped=[*numbered(first, "skipped").values()],
        skip_scores=[*numbered(first, "skip_scores").values()],
        visible=numbered(first, "present_visible"),
        logits=np.stack(logits),
        kv=[(key, first[f"present_value.{layer}"]) for layer, key in numbered(first, "present_key").items()],
        tokens=tokens,
    )


def numbered(outputs: Mapping[str, np.ndarray], name: str) -> dict[int, np.ndarray]:
    """The outputs `name.0`, `name.1`, ... by number, ascending."""
    found = {int(key.rpartition(".")[2]): key for key in outputs if key.rpartition(".")[0] == name}
    return {number: outputs[found[number]] for number in sorted(found)}
