"""Prefill of every method against dense, and of dense against the peer, on one geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from trimvlm.accounting import mac2, selection_flops
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_tools.bench import peer
from trimvlm_tools.bench.feeds import peer_feeds, prefill_feeds, write_arrays
from trimvlm_tools.bench.geometry import Geometry
from trimvlm_tools.bench.harness import Contender, Race, Spread, graph_contender, race
from trimvlm_tools.bench.random_llava import TEXT_BEFORE_IMAGE

DENSE = "dense"
PEER = "transformers"
_SAME = 1e-3  # largest difference of logits, relative to their largest value, of two graphs of one model


class Flops(Value, frozen=True, kw_only=True):
    """What a prefill costs, 2 per multiply-accumulate.

    Attributes:
        layers: the decoder layers, as the papers count (MAC2).
        selection: scoring rows, which the papers leave out.
        lm_head: the LM head of the one row whose logits are wanted.
    """

    layers: int
    selection: int
    lm_head: int

    @property
    def total(self) -> int:
        """All that the graph computes in matrix products."""
        return self.layers + self.selection + self.lm_head


class Contest(Value, frozen=True, kw_only=True):
    """One method's prefill.

    Attributes:
        seconds: wall-clock time.
        time_ratio: to dense, round by round.
        cpu_ratio: processor time to dense, round by round; with one thread (no busy waiting) it holds on a
            busy machine as well.
        flops, flops_ratio: of all that the graph computes, and that over dense.
        overhead: median of `time_ratio` over `flops_ratio`: 1 if time follows FLOPs.
        cores: processors kept busy during its runs (median).
        open_seconds: time to open the session.
    """

    method: str
    seconds: Spread
    time_ratio: Spread
    cpu_ratio: Spread
    flops: Flops
    flops_ratio: float
    overhead: float
    cores: float
    open_seconds: float


class AgainstPeer(Value, frozen=True, kw_only=True):
    """Dense against the peer.

    Attributes:
        peer: its name and settings.
        seconds: the peer's wall-clock time.
        time_ratio, cpu_ratio: our dense graph's time over the peer's, round by round.
        largest_difference: of the logits of the last row, relative to the largest logit.
    """

    peer: str
    seconds: Spread
    time_ratio: Spread
    cpu_ratio: Spread
    cores: float
    largest_difference: float


def prefill_flops(schedule: Schedule, text: int) -> Flops:
    """Of one image and `text` text rows."""
    return Flops(
        layers=mac2(schedule, text),
        selection=selection_flops(schedule, text),
        lm_head=2 * schedule.model.hidden * schedule.model.vocab,
    )


def prefill_contenders(
    bundle: Bundle, profiles: Mapping[str, Profile], geometry: Geometry, work: Path, *, threads: int
) -> list[Contender]:
    """A contender per profile: its fused decoder graph of the bundle. Feeds are written to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    contenders = []
    for name, profile in profiles.items():
        schedule = Schedule.resolve(profile, bundle.manifest.profiles[name].model)
        feeds = prefill_feeds(
            schedule, text=geometry.text, before_image=TEXT_BEFORE_IMAGE, seed=geometry.seed
        )
        path = work / f"{name}.npz"
        write_arrays(path, feeds)
        _, entry = bundle.entry(name)
        graph = bundle.path(entry.decoders["fused"])
        contenders.append(graph_contender(name, graph, path, threads=threads))
    return contenders


def peer_contender(
    checkpoint: Path, geometry: Geometry, directory: Path, work: Path, *, threads: int
) -> Contender:
    """The peer's dense prefill graph of the same checkpoint, fed with the same rows."""
    graph = peer.export_peer(checkpoint, geometry, directory)
    embedding_VD = peer.read_tensor(checkpoint, "embed_tokens.weight")
    feeds = peer_feeds(
        embedding_VD,
        geometry.visual_tokens,
        text=geometry.text,
        before_image=TEXT_BEFORE_IMAGE,
        seed=geometry.seed,
    )
    work.mkdir(parents=True, exist_ok=True)
    write_arrays(work / f"{PEER}.npz", feeds)
    return graph_contender(PEER, graph, work / f"{PEER}.npz", threads=threads)


def run_contest(
    contenders: list[Contender], work: Path, *, runs: int, advance: Callable[[str], None] = lambda _: None
) -> Race:
    """Runs the race; outputs of dense and of the peer are kept in `work` for `against_peer`."""
    save = {c.name: work / f"{c.name}.outputs.npz" for c in contenders if c.name in (DENSE, PEER)}
    return race(contenders, runs=runs, save=save, advance=advance)


def contests(result: Race, profiles: Mapping[str, Profile], text: int) -> list[Contest]:
    """Figures of every method that ran.

    Raises:
        UserError: dense, which all are compared with, failed.
    """
    if DENSE in result.failed:
        raise UserError(f"the dense decoder failed, nothing to compare with: {result.failed[DENSE]}")
    costs = {
        name: prefill_flops(Schedule.resolve(profile, profile.model), text)
        for name, profile in profiles.items()
    }
    found = []
    for name, cost in costs.items():
        if name in result.failed:
            continue
        time_ratio = result.ratio(name, DENSE)
        flops_ratio = cost.total / costs[DENSE].total
        found.append(
            Contest(
                method=name,
                seconds=result.spread(name),
                time_ratio=time_ratio,
                cpu_ratio=result.ratio(name, DENSE, "cpu_seconds"),
                flops=cost,
                flops_ratio=flops_ratio,
                overhead=time_ratio.median / flops_ratio,
                cores=result.cores(name),
                open_seconds=result.open_seconds[name],
            )
        )
    return found


def against_peer(result: Race, checkpoint: Path, work: Path) -> AgainstPeer:
    """Dense against the peer, once both have run.

    Raises:
        UserError: they do not compute the same function, so their times may not be compared.
    """
    with np.load(work / f"{DENSE}.outputs.npz") as ours, np.load(work / f"{PEER}.outputs.npz") as theirs:
        mine_V = ours["logits"][0]
        lm_head_VD = peer.read_tensor(checkpoint, "lm_head.weight")
        their_V = peer.logits(theirs["last_hidden_state"][0, -1], lm_head_VD)
    difference = float(np.abs(mine_V - their_V).max() / np.abs(their_V).max())
    if not difference <= _SAME:
        raise UserError(
            f"the dense decoder and {PEER} differ by {difference:.2g} of the largest logit, over {_SAME}; "
            "times of different functions are not compared"
        )
    return AgainstPeer(
        peer=f"{PEER}, {', '.join(f'{key}={value}' for key, value in peer.SETTINGS.items())}",
        seconds=result.spread(PEER),
        time_ratio=result.ratio(DENSE, PEER),
        cpu_ratio=result.ratio(DENSE, PEER, "cpu_seconds"),
        cores=result.cores(PEER),
        largest_difference=difference,
    )
