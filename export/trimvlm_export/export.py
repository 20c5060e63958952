"""Export: checkpoint + Profile -> Bundle. `export` shows the whole pipeline."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
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
    record,
    write_manifest,
    write_whole,
)
from trimvlm.encoder_rules import check_tower
from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec, Profile
from trimvlm.schedule import Schedule
from trimvlm_export.checkpoint import model_spec, tower
from trimvlm_export.decoder_graph import export_decoder
from trimvlm_export.hashes import remember, weight_hash
from trimvlm_export.processing import image_processing, text_processing
from trimvlm_export.router_graph import export_router, gather_choices
from trimvlm_export.router_weights import find_weights
from trimvlm_export.source import CHECKPOINT, Source
from trimvlm_export.vision_graph import export_vision


def export(
    checkpoint: Path | str,
    profile: Profile,
    out: Path | str,
    *,
    dtype: Dtype = "float32",
    beside: Path | None = None,
) -> Path:
    """Writes a bundle, or adds a profile to the bundle of the same checkpoint and precision.

    Args:
        checkpoint: directory of a Hugging Face checkpoint with safetensors.
        profile: must have been made for this model.
        out: the bundle's directory.
        dtype: precision of the weights and activations.
        beside: directory of the profile's file, where a router's weights lie too.

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
    image = image_processing(checkpoint)
    text = text_processing(checkpoint)
    before = _same(existing, spec, dtype)
    choices = gather_choices(before, profile, schedule)
    with _destination(out, new=before is None) as directory:
        source = Source.place(checkpoint, directory, dtype)
        vision, projector = export_vision(source, stage, spec.grid)
        routing = export_router(source, profile, router) if router else ()
        decoders = export_decoder(source, profile.key, schedule)
        profile_file = f"{profile.key}.profile.json"
        encoded = msgspec.json.format(msgspec.json.encode(profile), indent=2)
        write_whole(directory / profile_file, encoded + b"\n")
        graphs = [name for name in (vision, projector, *routing, *decoders.values()) if name]
        written = [*source.files, profile_file, *graphs]
        entry = Entry(
            model=spec,
            tower=geometry,
            profile=profile_file,
            vision=vision,
            projector=projector,
            router=next(iter(routing), None),
            decoders=decoders,
        )
        manifest = Manifest(
            producer=f"trimvlm {trimvlm.__version__}, torch {torch.__version__}",
            fingerprint=spec.fingerprint or "",
            dtype=dtype,
            image=image,
            text=msgspec.structs.replace(text, tokenizer=f"{CHECKPOINT}/{text.tokenizer}"),
            weights=source.weight_files,
            ignored_tensors=_ignored(source, before),
            profiles={**(before.profiles if before else {}), profile.key: entry},
            choices=choices,
            files={**(before.files if before else {}), **_recorded(directory, written)},
        )
        write_manifest(directory, manifest)
    return out


@contextlib.contextmanager
def _destination(out: Path, *, new: bool) -> Iterator[Path]:
    """Where to write: a new bundle appears under its name when it is whole; a profile is added in place,
    file by file, the manifest last."""
    if not new:
        yield out
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        directory = Path(scratch) / out.name
        directory.mkdir()
        yield directory
        if out.exists():
            out.rmdir()  # empty, as `existing_bundle` saw
        directory.rename(out)


def existing_bundle(out: Path) -> Bundle | None:
    """The bundle that a profile is added to, or None for a new one; what it knows of its weights is kept.

    Raises:
        UserError: there is something else.
    """
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a bundle; give a new directory")
        return None
    bundle = Bundle(out)
    remember(bundle)
    return bundle


def _same(bundle: Bundle | None, spec: ModelSpec, dtype: Dtype) -> Manifest | None:
    """The bundle's manifest, if it is of the same checkpoint in the same precision."""
    if bundle is None:
        return None
    manifest = bundle.manifest
    if manifest.fingerprint != spec.fingerprint or manifest.dtype != dtype:
        raise UserError(
            f"{bundle.directory}: holds another checkpoint or precision ({manifest.dtype}); give a new "
            "directory"
        )
    return manifest


def _ignored(source: Source, before: Manifest | None) -> dict[str, str]:
    """Tensors that no graph of the bundle uses: neither this profile's nor another's."""
    ignored = source.ignored()
    return {name: ignored[name] for name in ignored if before is None or name in before.ignored_tensors}


def _recorded(out: Path, names: list[str]) -> dict[str, File]:
    """Sizes and hashes."""
    return {
        name: File(bytes=(out / name).stat().st_size, sha256=weight_hash(out / name))
        if name.endswith(".safetensors")
        else record(out / name)
        for name in names
    }
