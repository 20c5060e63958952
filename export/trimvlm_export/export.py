"""Export: checkpoint + Profile -> Bundle. `export` shows the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

import trimvlm
from trimvlm.bundle import (
    MANIFEST,
    Bundle,
    Dtype,
    Entry,
    File,
    Manifest,
    TextProcessing,
    record,
    write_manifest,
    write_whole,
)
from trimvlm.encoder_rules import check_tower
from trimvlm.errors import UserError
from trimvlm.image_processing import ImageProcessing
from trimvlm.profile import ModelSpec, Profile
from trimvlm.schedule import Schedule
from trimvlm_export.checkpoint import model_spec, tower
from trimvlm_export.decoder_graph import export_decoder
from trimvlm_export.hashes import remember, weight_hash
from trimvlm_export.placing import place, scratch
from trimvlm_export.processing import image_processing, text_processing
from trimvlm_export.router_graph import export_router, gather_choices
from trimvlm_export.router_weights import find_weights
from trimvlm_export.source import CHECKPOINT, Source, small_files
from trimvlm_export.vision_graph import export_vision

PRODUCER = f"trimvlm {trimvlm.__version__}, torch {torch.__version__}"


def export(
    checkpoint: Path | str,
    profile: Profile,
    out: Path | str,
    *,
    dtype: Dtype = "float32",
    beside: Path | None = None,
    filled: bool = False,
) -> Path:
    """Writes a bundle, or adds a profile to the bundle of the same checkpoint and precision.

    Args:
        checkpoint: directory of a Hugging Face checkpoint with safetensors.
        profile: must have been made for this model.
        out: the bundle's directory.
        dtype: precision of the weights and activations.
        beside: directory of the profile's file, where a router's weights lie too.
        filled: also the decoder without empty tensors, for a target with `empty_tensors: false`.

    Returns:
        The bundle's directory.

    Raises:
        UserError: the profile does not fit the model or its vision tower, its router is missing or another
            one, the checkpoint is incomplete or of an unknown kind, or `out` holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    existing = existing_bundle(out)
    spec = model_spec(checkpoint, profile.model.grid)
    schedule, stage = Schedule.resolve(profile, spec), profile.decisions.encoder
    geometry = tower(checkpoint, profile.model.grid)
    if stage:
        check_tower(stage, geometry, spec.visual_tokens)
    router = find_weights(profile, beside)
    before = _same(out, existing.manifest, spec, dtype) if existing else None
    proven = before is not None and _same_files(checkpoint, before)
    image, text = (before.image, before.text) if before and proven else _processing(checkpoint)
    gather_choices(before, profile, schedule)  # refuses before the work what cannot be added
    with scratch(out, existing) as directory:
        source = Source.place(checkpoint, directory, dtype, proven=proven)
        vision, projector = export_vision(source, stage, spec.grid)
        routing = export_router(source, profile, router) if router else ()
        decoders = export_decoder(source, profile.key, schedule)
        if filled:
            decoders |= export_decoder(source, profile.key, schedule, filled=True)
        profile_file = f"{profile.key}.profile.json"
        encoded = msgspec.json.format(msgspec.json.encode(profile), indent=2)
        write_whole(directory / profile_file, encoded + b"\n")
        graphs = [name for name in (vision, projector, *routing, *decoders.values()) if name]
        entry = Entry(
            model=spec,
            tower=geometry,
            profile=profile_file,
            vision=vision,
            projector=projector,
            router=next(iter(routing), None),
            decoders=decoders,
        )
        alone = Manifest(
            producer=PRODUCER,
            fingerprint=spec.fingerprint or "",
            dtype=dtype,
            image=image,
            text=text,
            weights=source.weight_files,
            ignored_tensors=source.ignored(),
            profiles={profile.key: entry},
            choices=gather_choices(None, profile, schedule),
            files=_recorded(directory, [*source.files, profile_file, *graphs]),
        )

        def added(manifest: Manifest) -> Manifest:
            """`alone` in what the bundle is by then. Graphs that profiles share stay as they are; tensors are
            ignored that no profile uses."""
            same, shared = _same(out, manifest, spec, dtype), {vision, projector, *routing}
            unused = alone.ignored_tensors.items() & same.ignored_tensors.items()
            files = {k: v for k, v in alone.files.items() if k not in shared or k not in same.files}
            return msgspec.structs.replace(
                alone,
                ignored_tensors=dict(sorted(unused)),
                profiles={**same.profiles, profile.key: entry},
                choices=gather_choices(same, profile, schedule),
                files={**same.files, **files},
            )

        write_manifest(directory, alone)
        place(directory, out, added)
    return out


def existing_bundle(out: Path) -> Bundle | None:
    """The bundle that a profile is added to, or None for a new one; what it knows of its weights is kept.

    Raises:
        UserError: there is something else, or a damaged file.
    """
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a bundle; give a new directory")
        return None
    bundle = Bundle(out)
    bundle.check(())
    remember(bundle)
    return bundle


def _same(out: Path, manifest: Manifest, spec: ModelSpec, dtype: Dtype) -> Manifest:
    """The manifest, if it is of the same checkpoint in the same precision.

    Raises:
        UserError: it is not.
    """
    if manifest.fingerprint != spec.fingerprint or manifest.dtype != dtype:
        raise UserError(
            f"{out}: holds another checkpoint or precision ({manifest.dtype}); give a new directory"
        )
    return manifest


def _same_files(checkpoint: Path, before: Manifest) -> bool:
    """Whether a bundle was made of the same small files by the same version: what it says of images and texts
    was proven then."""
    files = {f"{CHECKPOINT}/{file.name}": record(file) for file in small_files(checkpoint)}
    had = {name: file for name, file in before.files.items() if name.endswith((".json", ".jinja"))}
    same = files == {name: file for name, file in had.items() if name.startswith(f"{CHECKPOINT}/")}
    return same and before.producer == PRODUCER


def _processing(checkpoint: Path) -> tuple[ImageProcessing, TextProcessing]:
    """What images and texts go through."""
    text = text_processing(checkpoint)
    frozen = msgspec.structs.replace(text, tokenizer=f"{CHECKPOINT}/{text.tokenizer}")
    return image_processing(checkpoint), frozen


def _recorded(out: Path, names: list[str]) -> dict[str, File]:
    """Sizes and hashes."""
    return {
        name: File(bytes=(out / name).stat().st_size, sha256=weight_hash(out / name))
        if name.endswith(".safetensors")
        else record(out / name)
        for name in names
    }
