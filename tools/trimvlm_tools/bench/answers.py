"""Time to the first token of an answer about an image: ours, and that of peers that run whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trimvlm.bundle import Bundle
from trimvlm.profile import Profile
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_tools.bench.bundles import own_target
from trimvlm_tools.bench.decisions import DENSE
from trimvlm_tools.bench.groups import Samples, race_in_groups
from trimvlm_tools.bench.harness import Contender, Resident, Spread
from trimvlm_tools.bench.peers import find_peer
from trimvlm_tools.bench.peers.environment import Answering, PeerError, peer_contender
from trimvlm_tools.bench.points import Setting
from trimvlm_tools.bench.stages import Steps, noise_image, session_contender, steps_of


class PeerAnswer(Value, frozen=True, kw_only=True):
    """A peer's time to the first token.

    Attributes:
        keep: visual tokens that its own pruning leaves; None: all.
        first_token: seconds, everything included.
        ratio: to our dense answer, round by round.
    """

    peer: str
    keep: int | None
    first_token: Spread
    ratio: Spread
    open_seconds: float
    memory: Resident | None


class Answers(Value, frozen=True, kw_only=True):
    """One image, one question, one token.

    Attributes:
        kept: visual tokens per layer of each of our profiles, on average: what peers' pruning is asked for.
        samples: of each contender, what the figures are medians of.
        ratios: time to the first token over that of our dense profile, round by round.
    """

    visual: int
    text: int
    ours: tuple[Steps, ...]
    samples: dict[str, tuple[Samples, ...]]
    ratios: dict[str, Spread]
    kept: dict[str, int]
    peers: tuple[PeerAnswer, ...]
    failed: dict[str, str]


def measure_answers(
    setting: Setting,
    profiles: Mapping[str, Profile],
    question: str,
    picture: tuple[int, int],
    *,
    text: int,
    advance: Callable[[str], None] = lambda _: None,
) -> Answers:
    """Races whole answers of one token.

    Args:
        profiles: of the checkpoint's own images, dense first.
        text: text rows of the prompt that the question makes.
    """
    work, bundle = setting.work / "answers", Bundle(setting.bundle)
    image = noise_image(work / "noise.png", picture)
    ours = [
        session_contender(
            name,
            bundle,
            profile.key,
            work,
            target=own_target(setting.precision, setting.model),
            image=image,
            prompt=question,
            tokens=1,
            threads=setting.threads,
        )
        for name, profile in profiles.items()
    ]
    kept = {
        name: round(Schedule.resolve(each, each.model).mean_visual_tokens) for name, each in profiles.items()
    }
    theirs, failed = _peers(setting, Answering(image=image, question=question), _budgets(kept))
    weights = sum(bundle.manifest.files[file].bytes for file in bundle.manifest.weights)
    everybody = [*ours, *(contender for contender, _, _ in theirs)]
    result = race_in_groups(
        everybody[1:],
        always=everybody[:1],
        needs={each.name: round(1.05 * weights + 1e9) for each in ours}
        | {each.name: round(1.5 * weights + 2e9) for each, _, _ in theirs},
        runs=setting.runs,
        processes=setting.processes,
        save={},
        advance=advance,
    )
    ran = [name for name in profiles if name not in result.failed]
    return Answers(
        visual=setting.model.visual_tokens,
        text=text,
        ours=tuple(steps_of(result, name) for name in ran),
        samples={
            each.name: result.samples(each.name) for each in everybody if each.name not in result.failed
        },
        ratios={name: result.ratio(name, "first_token") for name in ran},
        kept=kept,
        peers=tuple(
            PeerAnswer(
                peer=peer,
                keep=keep,
                first_token=result.spread(contender.name, "first_token"),
                ratio=result.ratio(contender.name, "first_token"),
                open_seconds=result.open_seconds(contender.name),
                memory=result.memory(contender.name),
            )
            for contender, peer, keep in theirs
            if contender.name not in result.failed
        ),
        failed=failed | result.failed,
    )


def _budgets(kept: Mapping[str, int]) -> list[int]:
    return sorted({count for name, count in kept.items() if name != DENSE})


def _peers(
    setting: Setting, asked: Answering, budgets: Sequence[int]
) -> tuple[list[tuple[Contender, str, int | None]], dict[str, str]]:
    """Contenders with their peer's name and budget: each peer that answers, with each budget if it prunes."""
    found, failed = [], {}
    for name in setting.peers:
        peer = find_peer(name)
        for keep in (None, *(budgets if peer.PRUNES else ())) if peer.ANSWERS else ():
            label = name if keep is None else f"{name}@{keep}"
            try:
                contender = peer_contender(
                    name,
                    Answering(image=asked.image, question=asked.question, keep=keep),
                    setting.checkpoint,
                    setting.peers_directory,
                    precision=setting.precision,
                    threads=setting.threads,
                    label=label,
                )
            except PeerError as error:
                failed[label] = str(error)
            else:
                found.append((contender, name, keep))
    return found, failed
