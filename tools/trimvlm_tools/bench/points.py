"""The sweep: the decoder's workload at one point, all contenders and the machine's peaks turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimvlm.bundle import Bundle
from trimvlm.profile import ModelSpec, Profile
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_tools.bench import peaks as machine_peaks
from trimvlm_tools.bench.bundles import own_target
from trimvlm_tools.bench.decisions import DENSE
from trimvlm_tools.bench.decoding import DecoderFigures, agreement, own_figures, peer_figures
from trimvlm_tools.bench.groups import Samples, race_in_groups
from trimvlm_tools.bench.harness import Contender, ContenderError, own_contender
from trimvlm_tools.bench.operators import Profiled, profile_decoder
from trimvlm_tools.bench.peaks import Peaks, peaks_contender, read_peaks
from trimvlm_tools.bench.peers.environment import Decoding, PeerError, peer_contender
from trimvlm_tools.bench.prompt_rows import Point, decoder_rows, embedding_rows, image_part, prompt_ids
from trimvlm_tools.bench.roofline import weight_values


class PointFigures(Value, frozen=True, kw_only=True):
    """All contenders at one point, ours first and dense first among them.

    Attributes:
        peaks: of the machine, measured in the same rounds; None: that failed.
        samples: of each contender and of the machine, what the figures are medians of.
        failed: contenders that failed, with their error.
        operators: of those of ours that were asked for, where their time goes.
    """

    point: Point
    peaks: Peaks | None
    contenders: tuple[DecoderFigures, ...]
    samples: dict[str, tuple[Samples, ...]]
    failed: dict[str, str]
    operators: dict[str, Profiled] = {}

    def of(self, kind: str) -> list[DecoderFigures]:
        """Only `own` or `peer`."""
        return [each for each in self.contenders if each.kind == kind]


class Setting(Value, frozen=True, kw_only=True):
    """What holds for all points of one geometry.

    Attributes:
        operators: methods whose decoders are profiled operator by operator.
    """

    checkpoint: Path
    bundle: Path
    model: ModelSpec
    peers: tuple[str, ...]
    peers_directory: Path
    work: Path
    precision: str
    threads: int
    runs: int
    processes: int
    seed: int
    operators: tuple[str, ...] = ()


def measure_point(
    setting: Setting,
    profiles: Mapping[str, Profile],
    point: Point,
    advance: Callable[[str], None] = lambda _: None,
) -> PointFigures:
    """Races everybody at one point.

    Args:
        profiles: by method, for `point.visual` visual tokens.
    """
    work = setting.work / point.name
    work.mkdir(parents=True, exist_ok=True)
    ids_S = prompt_ids(point, setting.model.vocab, setting.seed)
    np.save(work / "ids.npy", ids_S)
    schedules = {name: Schedule.resolve(each, each.model) for name, each in profiles.items()}
    ours = [_own(setting, profiles[name], name, point, ids_S) for name in profiles]
    theirs, failed = _peers(setting, point, work)
    always = [ours[0], peaks_contender(work, threads=setting.threads)]
    save = {each.name: work / f"{each.name}.outputs.npz" for each in (ours[0], *theirs)}
    value_bytes = weight_bytes(setting, profiles[DENSE])
    needs = _needs(ours, theirs, schedules[DENSE], point, value_bytes)
    result = race_in_groups(
        [*ours[1:], *theirs],
        always=always,
        needs=needs,
        runs=setting.runs,
        processes=setting.processes,
        save=save,
        advance=advance,
    )
    failed |= result.failed
    peaks = read_peaks(result)
    terms = {"value_bytes": value_bytes, "peaks": peaks}
    figures = [
        own_figures(result, name, each, schedules[DENSE], point, **terms)
        for name, each in schedules.items()
        if name not in failed
    ]
    for each in theirs:
        if each.name in failed:
            continue
        found = agreement(save[DENSE], save[each.name])
        if setting.precision == "fp32" and not found.same:
            failed[each.name] = _differs(found.tokens, found.logits)
            continue
        figures.append(peer_figures(result, each.name, schedules[DENSE], point, **terms, agreement=found))
    operators: dict[str, Profiled] = {}
    for name in (name for name in setting.operators if name in schedules):
        try:
            operators[name] = profile_decoder(work / f"{name}.json", value_bytes)
        except ContenderError as error:
            failed[f"{name}, its operators"] = str(error)
        advance(f"{name}, its operators")
    measured = [*(each.name for each in figures), machine_peaks.NAME]
    return PointFigures(
        point=point,
        peaks=peaks,
        contenders=tuple(figures),
        samples={name: result.samples(name) for name in measured},
        failed=failed,
        operators=operators,
    )


def weight_bytes(setting: Setting, dense: Profile) -> float:
    """Bytes of one value of the decoder's matrices as they are read: 4 in float32; else what the file of
    quantised weights takes, codes and scales together."""
    if setting.precision == "fp32":
        return 4.0
    manifest = Bundle(setting.bundle).manifest
    engine = manifest.profiles[dense.key].engines[own_target(setting.precision, setting.model)]
    stored = manifest.files[engine.options["decoder"]["quantized"]["file"]].bytes
    return stored / weight_values(Schedule.resolve(dense, dense.model))


def _own(setting: Setting, profile: Profile, name: str, point: Point, ids_S: NDArray[np.int64]) -> Contender:
    work, schedule = setting.work / point.name, Schedule.resolve(profile, profile.model)
    image = ids_S[image_part(point.visual)][: schedule.visual_tokens]
    rows = decoder_rows(ids_S, point.visual, embedding_rows(setting.checkpoint, image))
    path = work / f"{name}.rows.npz"
    np.savez(path, allow_pickle=False, **rows)
    spec = {
        "bundle": str(setting.bundle.absolute()),
        "profile": profile.key,
        "target": own_target(setting.precision, setting.model),
        "threads": setting.threads,
        "rows": str(path.absolute()),
        "new_tokens": point.new_tokens,
    }
    return own_contender(name, "decoder_worker", spec, work / f"{name}.json")


def _peers(setting: Setting, point: Point, work: Path) -> tuple[list[Contender], dict[str, str]]:
    found, failed = [], {}
    for name in setting.peers:
        try:
            found.append(
                peer_contender(
                    name,
                    Decoding(ids=work / "ids.npy", new_tokens=point.new_tokens),
                    setting.checkpoint,
                    setting.peers_directory,
                    precision=setting.precision,
                    threads=setting.threads,
                    label=name,
                )
            )
        except PeerError as error:
            failed[name] = str(error)
    return found, failed


def _needs(
    ours: Sequence[Contender],
    theirs: Sequence[Contender],
    dense: Schedule,
    point: Point,
    value_bytes: float,
) -> dict[str, int]:
    """Memory that each may take, generously: weights (1.1 times, a peer 1.5 times), caches twice, scores of
    a layer. What is mapped besides can be dropped."""
    model, rows = dense.model, point.visual + point.text + point.new_tokens
    weights = value_bytes * weight_values(dense) + 4 * model.hidden * model.vocab
    caches = 8 * model.layers * model.kv_heads * model.head_dim * rows
    scores = 4 * model.heads * rows * rows + 4 * rows * (3 * model.ffn + model.vocab)
    rest = 2 * caches + scores + 0.5e9
    needs = {each.name: round(1.1 * weights + rest) for each in ours}
    needs |= {each.name: round(1.5 * weights + rest) for each in theirs}
    return needs | {machine_peaks.NAME: 4 << 30}


def _differs(tokens: int, logits: float | None) -> str:
    by = "" if logits is None else f", its logits differ by {logits:.2g} of the largest"
    first = "another first token" if tokens == 0 else "the same first token"
    return f"computes something else than our dense decoder: {first}{by}; times are not compared"
