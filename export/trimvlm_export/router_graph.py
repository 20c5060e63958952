"""The router as ONNX: one graph for every target and for all profiles that share it.

Its weights are a safetensors file of their own in the bundle; the text embeddings that it looks up are the
checkpoint's, where they lie.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trimvlm.bundle import Manifest, write_whole
from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm.router_spec import Choice
from trimvlm.schedule import Schedule
from trimvlm_export.checkpoint import Tensor
from trimvlm_export.passes.primitive import OPSET
from trimvlm_export.router import PromptRouter, Router, parameter_shapes
from trimvlm_export.router_weights import check_tensors
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save, trace
from trimvlm_export.weights import mapped

EMBEDDING = "embed_tokens.weight"


def export_router(source: Source, profile: Profile, weights: Path) -> tuple[str, str]:
    """Writes what a Profile's router needs; what another profile has written already stays.

    Args:
        profile: has a router.
        weights: its file, see `router_weights.find_weights`.

    Returns:
        File names of the graph and of its weights, in the bundle.

    Raises:
        UserError: the router of another model.
    """
    spec, model = profile.router, profile.model
    assert spec is not None
    graph, stored = f"{spec.stem}.onnx", f"{spec.stem}.safetensors"
    shapes = parameter_shapes(spec, model.hidden, model.layers)
    check_tensors(profile, weights, shapes)
    write_whole(source.out / stored, weights.read_bytes())
    tensors = check_tensors(profile, source.out / stored, shapes)
    router = Router(spec, model.hidden, model.layers)
    module = PromptRouter(router, model.vocab, model.hidden, getattr(torch, source.dtype))
    module.requires_grad_(False)
    found = source.load(module, {EMBEDDING: source.family.DECODER_PREFIX + EMBEDDING})
    found |= _load(module, tensors)
    traced = trace(
        module,
        _example(model.hidden, getattr(torch, source.dtype)),
        lambda _, dimension: dimension == 0,
        inputs={
            "input_ids": ["text"],
            "visual": ["visual", model.hidden],
            "text_positions": ["text"],
            "visual_positions": ["visual"],
        },
        outputs={"router_scores": ["visual"], "layer_scores": [model.layers - spec.first]},
        opset=OPSET,
    )
    attach_weights(traced, found, source.out)
    save(traced, source.out / graph)
    return graph, stored


def gather_choices(before: Manifest | None, profile: Profile, schedule: Schedule) -> dict[str, Choice]:
    """The choices of a bundle after `profile` was added to it.

    A choice has one router: a member with another one begins it anew, and the profiles that were its members
    stay profiles.

    Args:
        before: the bundle's manifest, or None for a new bundle.

    Raises:
        UserError: a profile and a choice of the same name.
    """
    name, choice = profile.key, profile.choice and profile.model.named(profile.choice)
    profiles = {name, *(before.profiles if before else ())}
    choices = {name: dict(choice.members) for name, choice in (before.choices if before else {}).items()}
    stems = {name: choice.router for name, choice in (before.choices if before else {}).items()}
    for members in choices.values():
        members.pop(name, None)
    if choice is not None:
        assert profile.router is not None
        if stems.get(choice) != profile.router.stem:
            choices[choice], stems[choice] = {}, profile.router.stem
        kept = (row.layer for row in schedule.rows if row.execute != "none")
        choices[choice][name] = tuple(n for n in kept if n >= profile.router.first)
    if taken := profiles & {name for name, members in choices.items() if members}:
        raise UserError(f"{min(taken)} cannot name both a profile and a choice in one bundle; rename one")
    return {name: Choice(router=stems[name], members=members) for name, members in choices.items() if members}


def load_router(profile: Profile, weights: Path) -> Router:
    """The network of a Profile with its weights, in torch.

    Raises:
        UserError: the router of another model.
    """
    spec, model = profile.router, profile.model
    assert spec is not None
    tensors = check_tensors(profile, weights, parameter_shapes(spec, model.hidden, model.layers))
    router = Router(spec, model.hidden, model.layers)
    router.load_state_dict({name: mapped(tensor) for name, tensor in tensors.items()})
    return router.requires_grad_(False).eval()


def _load(module: PromptRouter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {f"router.{name}": tensor for name, tensor in tensors.items()}
    views = {name: mapped(tensor) for name, tensor in named.items()}
    module.load_state_dict(views, strict=False, assign=True)
    return named


def _example(hidden: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments for tracing: an image between texts, sizes that are neither 0 nor 1 nor equal."""
    return {
        "input_ids": torch.zeros(9, dtype=torch.long),
        "visual": torch.zeros(6, hidden, dtype=dtype),
        "text_positions": torch.cat((torch.arange(3), torch.arange(9, 15))),
        "visual_positions": torch.arange(3, 9),
    }
