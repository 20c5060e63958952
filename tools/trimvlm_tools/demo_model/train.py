"""Train the demo model: `python -m trimvlm_tools.demo_model.train --minutes 90 --out build/demo_model`.

The schedule is driven by the clock, so a run ends on time on any machine; `--resume` continues a run that
was cut off and, with another `--schedule`, warm-restarts one for some more minutes.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from trimvlm_tools.demo_model.labels import NO_THING, AuxiliaryHeads, evidence, patch_labels
from trimvlm_tools.demo_model.model import make_config, make_model
from trimvlm_tools.demo_model.muon import Muon
from trimvlm_tools.demo_model.packing import (
    IGNORED,
    PREFIX,
    SLOT,
    encode_slots,
    project,
    read_slots,
    see_images,
)
from trimvlm_tools.demo_model.questions import KINDS, Sample, ask, samples
from trimvlm_tools.demo_model.scenes import draw_scene
from trimvlm_tools.demo_model.team import ALONE, Team
from trimvlm_tools.demo_model.vocabulary import save_processor

VALIDATION_FIRST = 1 << 39  # training never gets this far into its own split
CLIP = 1.0
AUXILIARY_WEIGHTS = {"dense": 0.5, "summary": 0.2, "align": 0.5, "centre": 0.5}
SAVE_SECONDS, LOG_SECONDS = 240.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the schedule: a share of the minutes, `hold` of it at full rates, then a cosine."""

    name: str
    share: float
    images: int
    questions: int
    muon: float
    adamw: float
    mix: tuple[float, ...] = (1.0,) * len(KINDS)  # weights in the order of KINDS
    vision: float = 1.0  # factor on the vision tower's rates
    hold: float = 1.0
    pointer: float = 0.3  # weight of the loss that points attention at the evidence

    def rate(self, progress: float, warm: float) -> float:
        """Factor on the rates at `progress` (0..1) of the stage; `warm`: share of the stage that warms up."""
        if progress < warm:
            return max(progress / warm, 0.05)
        if progress <= self.hold:
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - self.hold) / (1 - self.hold)))


#                colour shape read at  where count exist relation find row
_POSITIONS = (1.5, 1.5, 1.5, 3.0, 1.0, 0.5, 0.5, 0.5, 1.0, 2.0)
_HARD = (0.7, 0.7, 0.8, 0.5, 0.8, 3.5, 1.2, 3.5, 0.6, 1.0)
_COUNTING = (0.6, 0.6, 0.6, 0.5, 0.6, 6.0, 0.8, 1.0, 0.6, 1.0)
_LOOK_UPS = (1.5, 1.5, 1.5, 0.6, 1.6, 1.4, 0.8, 1.4, 1.6, 0.6)
_VISION = Stage(name="vision", share=0.065, images=24, questions=0, muon=4e-3, adamw=2e-3)
_DECODER = (
    Stage(name="positions", share=0.08, images=8, questions=12, muon=2.5e-3, adamw=1.5e-3, mix=_POSITIONS),
    Stage(
        name="look-ups", share=0.855, images=8, questions=16, muon=2e-3, adamw=1e-3, mix=_LOOK_UPS,
        vision=0.4, hold=0.2,
    ),
)  # fmt: skip
_COUNTS = Stage(
    name="counts",
    share=1.0,
    images=8,
    questions=16,
    muon=1.5e-3,
    adamw=7.5e-4,
    mix=_HARD,
    vision=0.3,
    hold=0.35,
)
_TAIL = Stage(
    name="tail",
    share=1.0,
    images=8,
    questions=16,
    muon=1.2e-3,
    adamw=6e-4,
    mix=_COUNTING,
    vision=0.3,
    hold=0.4,
    pointer=0.6,
)
SCHEDULES: dict[str, tuple[Stage, ...]] = {
    # The pieces below one after the other, in parts of 90 minutes: see README.md for what was run.
    "full": tuple(
        replace(stage, share=share)
        for stage, share in zip((_VISION, *_DECODER, _COUNTS, _TAIL), (6, 5, 40, 24, 15), strict=True)
    ),
    "decoder": _DECODER,  # for a run whose vision tower is trained already
    "counts": (_COUNTS,),
    "tail": (_TAIL,),
}


def stage_at(schedule: tuple[Stage, ...], progress: float) -> tuple[Stage, float]:
    """The stage at `progress` (0..1) of a schedule, and the progress within it."""
    start, progress = 0.0, progress * sum(stage.share for stage in schedule)
    for stage in schedule[:-1]:
        if progress < start + stage.share:
            return stage, (progress - start) / stage.share
        start += stage.share
    return schedule[-1], min(1.0, (progress - start) / schedule[-1].share)


@dataclass
class Batch:
    """Images [B, 3, H, W] in -1..1, patch labels, present words, slot ids and targets (or None), evidence."""

    pixels: Tensor
    labels: Tensor
    present: Tensor
    ids: Tensor | None
    targets: Tensor | None
    evidence_rows: Tensor  # [M] rows of the flattened slots [B * Q * SLOT] that look at a thing
    evidence_keys: Tensor  # float32 [M, prefix], ones where the thing is, or at `<s>`
    evidence_shares: Tensor  # float32 [M], of the row's attention
    centres: Tensor  # float32 [B, N]


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Uint8 [H, W, 3] images to float32 [B, 3, H, W] in -1..1, as the processor does."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def make_batch(first: int, images: int, questions: int, mix: tuple[float, ...]) -> Batch:
    """The batch of training images `first` to `first + images - 1`, a function of its arguments alone."""
    pictures, labels, present, asked, looks, keys, centres = [], [], [], [], [], [], []
    edges = np.cumsum(mix) / np.sum(mix)
    slot = 0
    for seed in range(first, first + images):
        scene = draw_scene(seed)
        rng = np.random.Generator(np.random.PCG64([seed, 2]))
        kinds = [KINDS[min(int(i), len(KINDS) - 1)] for i in np.searchsorted(edges, rng.random(questions))]
        asked.append([ask(scene, kind, rng) for kind in kinds])
        classes, occurring, owner, middle = patch_labels(scene)
        centres.append(middle)
        shown_at = np.zeros((len(scene.things) + 1, len(PREFIX) + len(owner)), dtype=np.float32)
        shown_at[:-1, len(PREFIX) :] = owner == np.arange(len(scene.things))[:, None]
        shown_at[NO_THING, 0] = 1.0
        for question, answer in asked[-1]:
            for row, index, share in evidence(scene, question, answer):
                looks.append((slot * SLOT + row, share))
                keys.append(shown_at[index])
            slot += 1
        pictures.append(scene.image)
        labels.append(classes)
        present.append(occurring)
    ids, targets = encode_slots(asked) if questions else (None, None)
    return Batch(
        pixels=to_pixels(pictures),
        labels=torch.from_numpy(np.stack(labels)),
        present=torch.from_numpy(np.stack(present)),
        ids=ids,
        targets=targets,
        evidence_rows=torch.tensor([row for row, _ in looks], dtype=torch.long),
        evidence_keys=torch.from_numpy(np.array(keys, dtype=np.float32)),
        evidence_shares=torch.tensor([share for _, share in looks]),
        centres=torch.from_numpy(np.stack(centres)),
    )


class Trainer:
    """Model, auxiliary heads, optimizers and the counters that a resumed run needs."""

    def __init__(self, seed: int, team: Team = ALONE) -> None:
        self.team = team
        self.model: LlavaForConditionalGeneration = make_model(make_config(), seed)
        self.heads = AuxiliaryHeads(self.model.lm_head.in_features)
        muon: dict[bool, list] = {False: [], True: []}
        adamw: dict[bool, list] = {False: [], True: []}
        for name, parameter in self.model.named_parameters():
            vision = "vision_tower" in name
            hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (muon if hidden else adamw)[vision].append(parameter)
        adamw[True] += self.heads.parameters()
        groups = [{"params": muon[v], "vision": v} for v in (False, True)]
        self.muon = Muon(groups, lr=0.0, team=team)
        groups = [{"params": adamw[v], "vision": v} for v in (False, True)]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.counters: dict[str, Any] = {"step": 0, "seed": 0, "asked": 0, "clock": 0.0, "total_clock": 0.0}
        self.counters["schedule"] = "full"

    def step(self, batch: Batch, stage: Stage, rate: float) -> dict[str, float]:
        """One update; returns what the log shows."""
        for optimizer, peak in ((self.muon, stage.muon), (self.adamw, stage.adamw)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate * (stage.vision if group["vision"] else 1.0)
            optimizer.zero_grad(set_to_none=True)
        model = self.model
        states = see_images(model, batch.pixels, torch.bfloat16)
        visual = project(model, states.features)
        table = model.model.language_model.embed_tokens.weight
        losses, accuracy = self.heads.losses(
            states, visual, table, labels_BN6=batch.labels, present=batch.present, centres_BN=batch.centres
        )
        loss = torch.stack([AUXILIARY_WEIGHTS[name] * value for name, value in losses.items()]).sum()
        shown = {name: value.item() for name, value in losses.items()}
        shown |= dict(zip(("color", "shape", "size", "glyph"), accuracy, strict=True))
        if batch.ids is not None and batch.targets is not None:
            hidden, attention = read_slots(model, visual, batch.ids)
            assert attention is not None
            looked = (attention.flatten(0, 1)[batch.evidence_rows] * batch.evidence_keys).sum(-1)
            pointer = -(batch.evidence_shares * (looked + 1e-4).log()).sum() / batch.evidence_shares.sum()
            wanted = batch.targets != IGNORED
            logits = F.linear(hidden[wanted].float(), model.lm_head.weight)
            answer = F.cross_entropy(logits, batch.targets[wanted])
            loss = loss + answer + stage.pointer * pointer
            shown |= {"answer": answer.item(), "pointer": pointer.item()}
        loss.backward()
        parameters = [p for o in (self.muon, self.adamw) for g in o.param_groups for p in g["params"]]
        self.team.average(parameters)
        graded = [parameter for parameter in parameters if parameter.grad is not None]
        shown["norm"] = torch.nn.utils.clip_grad_norm_(graded, CLIP).item()
        self.muon.step()
        self.adamw.step()
        return shown

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs, atomically."""
        parts = ("model", "heads", "muon", "adamw")
        state = {part: getattr(self, part).state_dict() for part in parts} | {"counters": self.counters}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        state = torch.load(path, weights_only=True)
        for part in ("model", "heads", "muon", "adamw"):
            getattr(self, part).load_state_dict(state[part])
        self.counters = state["counters"]


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, asked: list[Sample], dtype: torch.dtype
) -> dict[str, float]:
    """Share of samples per kind whose answer a greedy decode would give exactly, and `all`.

    Greedy decoding gives the answer exactly when each token of it, given those before, has the highest logit.
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), 16):
        part = asked[start : start + 16]
        ids, targets = encode_slots([[(sample.question, sample.answer)] for sample in part])
        pixels = to_pixels([np.asarray(sample.image) for sample in part])
        visual = project(model, see_images(model, pixels, dtype).features)
        logits = F.linear(read_slots(model, visual, ids)[0].float(), model.lm_head.weight.float())
        correct = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1)
        for sample, ok in zip(part, correct.tolist(), strict=True):
            right.setdefault(sample.kind, []).append(ok)
    share = {kind: sum(flags) / len(flags) for kind, flags in right.items()}
    return {"all": sum(map(sum, right.values())) / len(asked)} | share


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write an fp16 Hugging Face checkpoint with tokenizer, processor and chat template."""
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    save_processor(folder)


def train(trainer: Trainer, minutes: float, out: Path, validate: list[Sample]) -> None:
    """Run the trainer's schedule to its end, logging, validating and saving every few minutes.

    The images of a step are shared out between the team; the clock is that of its first process.
    """
    counters, team = trainer.counters, trainer.team
    schedule = SCHEDULES[str(counters["schedule"])]
    budget = 60.0 * minutes
    last = time.monotonic()
    next_log, next_save = 0.0, counters["clock"] + SAVE_SECONDS
    while counters["clock"] < budget:
        stage, progress = stage_at(schedule, counters["clock"] / budget)
        rate = stage.rate(progress, warm=min(0.1, 20.0 / (stage.share * budget)))
        share = stage.images // team.size
        shown = trainer.step(
            make_batch(counters["seed"] + team.rank * share, share, stage.questions, stage.mix), stage, rate
        )
        seconds = team.agree(time.monotonic() - last)
        last = time.monotonic()
        counters["clock"] += seconds
        counters["total_clock"] += seconds
        counters["step"] += 1
        counters["seed"] += share * team.size
        counters["asked"] += share * team.size * stage.questions
        if counters["clock"] >= next_log:
            next_log = counters["clock"] + LOG_SECONDS
            if team.rank == 0:
                figures = {name: float(f"{value:.3g}") for name, value in shown.items()}
                head = {
                    "minute": round(counters["clock"] / 60, 2),
                    "stage": stage.name,
                    "rate": round(rate, 3),
                }
                log(head | {name: counters[name] for name in ("step", "seed", "asked")} | figures)
        if counters["clock"] >= next_save:
            next_save = counters["clock"] + SAVE_SECONDS
            if team.rank == 0:
                trainer.save(out / "state.pt")
            if stage.questions:
                score = validation_score(trainer, validate, torch.bfloat16)
                if team.rank == 0:
                    log({"minute": round(counters["clock"] / 60, 2), "exact": score})
                    save_checkpoint(trainer.model, out / "latest_hf")
    score = validation_score(trainer, validate, torch.float32)
    if team.rank == 0:
        trainer.save(out / "state.pt")
        save_checkpoint(trainer.model, out / "latest_hf")
        log({"finished": counters, "exact": score})


def validation_score(trainer: Trainer, validate: list[Sample], dtype: torch.dtype) -> dict[str, float]:
    """`exact_match` on the first process; the others go on to the next step and wait there."""
    return exact_match(trainer.model, validate, dtype) if trainer.team.rank == 0 else {}


def log(entry: dict) -> None:
    """Print one line of JSON."""
    print(json.dumps(entry), flush=True)


def work(rank: int, arguments: argparse.Namespace, team: Team) -> None:
    """Body of one training process."""
    torch.set_num_threads(arguments.threads)
    team = replace(team, rank=rank)
    trainer = Trainer(arguments.seed, team)
    if arguments.resume:
        trainer.load(arguments.out / "state.pt")
    if trainer.counters["schedule"] != arguments.schedule:
        trainer.counters |= {"schedule": arguments.schedule, "clock": 0.0}
    if rank == 0:
        log({"arguments": {name: str(value) for name, value in vars(arguments).items()}})
    train(trainer, arguments.minutes, arguments.out, samples("train", 250, first=VALIDATION_FIRST))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90.0, help="length of the schedule")
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"), help="of state and checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="full")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/state.pt")
    parser.add_argument("--processes", type=int, default=2, help="training processes; must divide 4")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    size = arguments.processes
    if size == 1:
        work(0, arguments, ALONE)
        return
    count = sum(p.numel() for p in make_model(make_config(), 0).parameters()) + 100_000  # and the heads
    team = Team(
        size=size,
        barrier=get_context("spawn").Barrier(size),
        gradients=torch.zeros(size, count).share_memory_(),
        updates=torch.zeros(count).share_memory_(),
        value=torch.zeros(1, dtype=torch.float64).share_memory_(),
    )
    spawn(work, args=(arguments, team), nprocs=size)


if __name__ == "__main__":
    main()
