"""The bundle that a geometry is measured with: exported once, for every number of visual tokens."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trimvlm.bundle import MANIFEST, Bundle, Manifest, record, write_whole
from trimvlm.opening import ORT_CPU
from trimvlm.profile import ModelSpec, Profile
from trimvlm.schedule import Schedule
from trimvlm_engines.padding import PAGE
from trimvlm_engines.targets import PADDED
from trimvlm_tools import console
from trimvlm_tools.bench.geometry import GEOMETRY_FILE
from trimvlm_tools.bench.quiet import quiet

# By precision of the weights. In int4 everybody's kernels round activations to 8 bits, and blocks are of 128
# where they can be chosen.
TARGETS = {"fp32": "ort-cpu", "int4": "ort-cpu-int4a8x128"}


def own_target(precision: str, model: ModelSpec) -> str:
    """What our contenders run on: in float32 with longer rows where products read rows of whole pages."""
    widths = (model.hidden, model.heads * model.head_dim, model.ffn)
    paged = precision == "fp32" and any(4 * width % PAGE == 0 for width in widths)
    return f"{TARGETS[precision]}{PADDED if paged else ''}"


def bench_bundle(
    checkpoint: Path, profiles: Mapping[str, Profile], directory: Path, *, visual_tokens: int, precision: str
) -> Bundle:
    """A bundle of a checkpoint with these profiles; what it holds already is not exported again, and one that
    another exporter, builder or checkpoint made is made anew.

    Args:
        visual_tokens: of one image of the checkpoint. A profile for another number gets a decoder alone: its
            entry is good for the decoder's workload and nothing else.
        precision: of `TARGETS`; engines of the profiles are built where the target is not the graph itself.
    """
    stamp = directory.with_name(f"{directory.name}.made")
    made = f"{_sources_digest()}\n{(checkpoint / GEOMETRY_FILE).read_text()}"
    if not (stamp.is_file() and stamp.read_text() == made):
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(made)
    held = Bundle(directory) if (directory / MANIFEST).is_file() else None
    missing = {
        name: profile
        for name, profile in profiles.items()
        if not (held and profile.key in held.manifest.profiles)
        or held.profile(profile.key).digest != profile.digest
    }
    # The first profile of a bundle is a whole one: the others borrow its graphs before the decoder.
    order = sorted(missing, key=lambda name: profiles[name].model.visual_tokens != visual_tokens)
    with console.progress("export", total=len(order)) as advance, quiet():
        for name in order:
            if profiles[name].model.visual_tokens == visual_tokens:
                _export(checkpoint, profiles[name], directory)
            else:
                export_decoder_alone(checkpoint, profiles[name], directory)
            advance(name)
    target = own_target(precision, next(iter(profiles.values())).model)
    if target != ORT_CPU:
        _build(directory, [profile.key for profile in profiles.values()], target)
    return Bundle(directory)


def export_decoder_alone(checkpoint: Path, profile: Profile, out: Path) -> None:
    """Adds a profile for another number of visual tokens than the checkpoint's images give.

    Weights and decoder are the checkpoint's; its tower makes no such images, so the entry's vision graph is
    another profile's and does not fit.
    """
    from trimvlm_export.decoder_graph import export_decoder
    from trimvlm_export.export import existing_bundle
    from trimvlm_export.placing import place, scratch
    from trimvlm_export.source import Source

    bundle = existing_bundle(out)
    assert bundle is not None, "a bundle's first profile is whole"
    schedule = Schedule.resolve(profile, profile.model)
    with scratch(out, bundle) as directory:
        source = Source.place(checkpoint, directory, "float32", proven=True)
        decoders = export_decoder(source, profile.key, schedule)
        file = f"{profile.key}.profile.json"
        write_whole(directory / file, msgspec.json.encode(profile) + b"\n")
        own = {name: record(directory / name) for name in (file, *decoders.values())}

        def added(manifest: Manifest) -> Manifest:
            whole = next(iter(manifest.profiles.values()))
            entry = msgspec.structs.replace(
                whole, model=profile.model, profile=file, decoders=decoders, goldens=None, engines={}
            )
            return msgspec.structs.replace(
                manifest,
                profiles={**manifest.profiles, profile.key: entry},
                files={**manifest.files, **own},
            )

        place(directory, out, added)


def _export(checkpoint: Path, profile: Profile, out: Path) -> None:
    from trimvlm_export.export import export

    export(checkpoint, profile, out)


def _build(directory: Path, names: list[str], target: str) -> None:
    from trimvlm_engines.build import build

    with console.progress(f"build for {target}", total=len(names)) as advance:
        for name in names:
            build(directory, target, name)
            advance(name)


def _sources_digest() -> str:
    """SHA-256 over the sources of what is kept between runs: graphs, and what builds make of them."""
    import trimvlm_engines
    import trimvlm_export

    digest = hashlib.sha256()
    for root in (*trimvlm_export.__path__, *trimvlm_engines.__path__):
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
