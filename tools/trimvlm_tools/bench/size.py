"""Bundle size against the checkpoint it was made from, in the precision that runs."""

from __future__ import annotations

import math
from pathlib import Path

from trimvlm.bundle import MANIFEST, Bundle, Manifest
from trimvlm.value import Value

_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Size(Value, frozen=True, kw_only=True):
    """Bytes on disk.

    Attributes:
        bundle: files of the bundle as exported, for `profiles` profiles; what builds added is not counted.
        weights: its weight files.
        per_profile: files that belong to one profile alone (decoder graphs, profile, goldens), the largest.
        checkpoint: the checkpoint's files, its tensors counted in the precision of the bundle.
    """

    profiles: int
    bundle: int
    weights: int
    per_profile: int
    checkpoint: int

    @property
    def over_checkpoint(self) -> float:
        """What a bundle takes over its checkpoint."""
        return self.bundle / self.checkpoint


def bundle_size(bundle: Bundle, checkpoint: Path) -> Size:
    """Measures both on disk."""
    manifest = bundle.manifest
    built = _built(manifest)
    sizes = {name: file.bytes for name, file in manifest.files.items() if name not in built}
    sizes[MANIFEST] = (bundle.directory / MANIFEST).stat().st_size
    own = [
        sum(sizes[name] for name in {entry.profile, entry.goldens, *entry.decoders.values()} if name)
        for entry in manifest.profiles.values()
    ]
    return Size(
        profiles=len(manifest.profiles),
        bundle=sum(sizes.values()),
        weights=sum(sizes[name] for name in manifest.weights),
        per_profile=max(own),
        checkpoint=checkpoint_bytes(checkpoint, _VALUE_BYTES[manifest.dtype]),
    )


def _built(manifest: Manifest) -> set[str]:
    """Files that are there for engines alone: plans, graphs and quantised weights."""
    made: set[str] = set()
    exported = set(manifest.weights)
    for entry in manifest.profiles.values():
        exported.update(each for each in (entry.vision, entry.projector, entry.router) if each)
        exported.update(entry.decoders.values())
        for engine in entry.engines.values():
            made.update(engine.graphs.values())
            made.update(file for options in engine.options.values() for file in options.get("weights", {}))
    return made - exported


def checkpoint_bytes(checkpoint: Path, value_bytes: int) -> int:
    """Bytes of a checkpoint's files, every tensor counted with `value_bytes` per value."""
    from safetensors import safe_open

    total = 0
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            total += path.stat().st_size
            continue
        with safe_open(path, framework="numpy") as file:
            total += value_bytes * sum(
                math.prod(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 - not a dict
            )
    return total
