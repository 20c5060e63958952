"""The Bundle: the directory that export writes and everything else reads.

    manifest.json                     this file's types; readable with nothing but JSON
    weights/*.safetensors             one copy of the weights, for every profile of the checkpoint
    tokenizer.json
    vision.onnx                       vision tower + projector
    vision-tower-<taps>.onnx          tower alone, for profiles with an encoder stage
    projector.onnx                    projector alone, for all of them
    router-<digest>.onnx              router with its .safetensors, for profiles that have it
    <profile>.decoder.fused.onnx      decoder graphs, a file of kilobytes each: weights are external data
    <profile>.decoder.primitive.onnx
    <profile>.decoder.in_place.onnx   fused, with caches that grow in place: `trimvlm.backends.caches`
    <profile>.decoder.*.filled.onnx   the same without empty tensors, if asked for: `trimvlm.filling`
    <profile>.profile.json
    <profile>.goldens.json            what the reference computed, for `trimvlm check`
    <profile>.<target>.decoder.engine plans written by `trimvlm build`
    <profile>.<target>.decoder.0.onnx decoder graphs in pieces, and their plans, where the target wants them
    weights.quantized.*.safetensors   codes and scales, for targets with quantised weights
    weights.padded.*.safetensors      matrices with longer rows, for targets that ask for them

Several profiles of one checkpoint live in one Bundle and share the weight files. All paths in the manifest
are relative to the directory and may not leave it.

Decoder graph, inputs and outputs (T text rows, N visual rows, P past rows, G key/value heads, C head size):

    input_ids int64 [T]                   text ids, image tokens taken out
    visual float [N, D]                   projector outputs; no rows at decode
    text_positions int64 [T]              position of each text row in the full, unpruned sequence
    visual_positions int64 [N]
    forced.{s} int64 [0 or K]             indices that replace selection s (parity); no rows: free running
    past_key.{l}, past_value.{l}          float [1, G, P_g, C], one symbolic P_g per distinct budget
    logits float32 [1, V]                 of the last text row
    present_key.{l}, present_value.{l}    float [1, G, P_g + cached rows, C]; visual rows first, then text
    selected.{s} int64 [K]                rows of `visual` that survive selection s, ascending
    scores.{s} float32 [N_s]              score of each row that entered selection s

Only where the Schedule asks for it:

    router_scores float32 [N]             input: what a selection by `router` ranks
    forced_skip.{k} int64 [0 or K]        input: rows of `visual` that skip from skip stage k on (parity)
    skipped.{k} int64 [K]                 rows of `visual` in skip mode from stage k on, ascending
    skip_scores.{k} float32 [live]        accumulator of each live row at stage k
    past_visible.{s} bool [P_g]           for s in `Schedule.masks`: cached rows that selection s's threshold
    present_visible.{s} bool [P_g + ...]  leaves visible; text rows always are

Layers without attention have no past and no present.

Vision graph (I images, S tower rows, E' width of a row that the projector reads): `pixel_values`
[I, 3, H, W] -> `visual` [I * N, D]. With an encoder stage: -> `tower` [I, S, E'] and what the stage reads:

    cls_attention.{l}, received_attention.{l}, joint_attention.{l}    float32 [I, N]
    keys.{l}                              [I, S, heads, C]
    features.{n}                          [I, S, E]

and the projector graph: `features` [rows, E'] -> `visual` [rows, D]. Router graph: see `trimvlm.routing`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from trimvlm import files
from trimvlm.errors import UserError
from trimvlm.files import File, is_whole, record, sha256, write_whole
from trimvlm.manifest import (
    FORMAT,
    MANIFEST,
    DecoderGraph,
    Dtype,
    Engine,
    Entry,
    Lowering,
    Manifest,
    PromptTemplate,
    TextProcessing,
    read_manifest,
    write_manifest,
)
from trimvlm.profile import Profile, to_profile

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Bundle",
    "DecoderGraph",
    "Dtype",
    "Engine",
    "Entry",
    "File",
    "Lowering",
    "Manifest",
    "PromptTemplate",
    "TextProcessing",
    "record",
    "sha256",
    "write_manifest",
    "write_whole",
]

PENDING = ".pending"  # what `trimvlm.publishing` is putting in place
PATIENCE = 5.0  # seconds; putting files in place takes milliseconds


class Bundle:
    """A bundle on disk: its manifest, and paths that are known to exist.

    Raises (on open):
        UserError: no bundle there, an unknown format, a damaged manifest, a path that leaves the directory, a
            file that is missing, of the wrong size or not in the manifest.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._root = self.directory.resolve()
        deadline = time.monotonic() + PATIENCE
        while problem := self._problem():
            # A build or export may be putting its files in place just now, the manifest last.
            busy = (self.directory / PENDING).exists()
            again = read_manifest(self.directory)
            if again == self.manifest and not busy:
                raise UserError(f"{self.directory}: {problem}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.directory}: {problem}; a build or export was interrupted as it put its files in "
                    f"place: finish it with trimvlm verify {self.directory}"
                )
            if again == self.manifest:
                time.sleep(0.02)
            self.manifest = again

    def _problem(self) -> str | None:
        """The first file that is missing, of another size or not in the manifest."""
        for name, file in self.manifest.files.items():
            path = self.path(name)
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                said = "is missing" if size is None else f"has {size} bytes, not {file.bytes}"
                return f"{name} {said}; {self.remedy(name)}"
        extra = next((name for name in visible_files(self.directory) if name not in self._known), None)
        return extra and (
            f"{extra} is not in {MANIFEST}, so it is no part of the bundle; remove it, or copy the bundle "
            "again"
        )

    @property
    def _known(self) -> set[str]:
        return {MANIFEST, *self.manifest.files}

    def path(self, name: str) -> Path:
        """Path of a file named in the manifest; links may not lead out of the directory.

        Raises:
            UserError: it leaves the directory.
        """
        path = (self._root / name).resolve()
        if not path.is_relative_to(self._root):
            raise UserError(f"{self.directory}: {name} leads out of the bundle; copy it with the file itself")
        return path

    def remedy(self, name: str) -> str:
        """What to do about a file that is missing or damaged."""
        for profile, entry in self.manifest.profiles.items():
            for engine in entry.engines.values():
                if name in engine.made:
                    return rebuild(self.directory, engine, profile)
        return "copy the bundle again, or export to a new directory"

    def _damage(self, name: str) -> str:
        return f"{self.directory}: {name} is damaged (SHA-256 differs); {self.remedy(name)}"

    def check(self, read: Iterable[str]) -> None:
        """Compares with the recorded SHA-256: every small file, and the large ones that will be read.

        Raises:
            UserError: naming the first file that differs.
        """
        wanted = set(read)
        for name, file in self.manifest.files.items():
            if (file.bytes <= files.SMALL or name in wanted) and not is_whole(self.path(name), file):
                raise UserError(self._damage(name))

    def entry(self, profile: str | None = None) -> tuple[str, Entry]:
        """Name and entry of a profile; None where the bundle holds a single one.

        Raises:
            UserError: unknown name, or none given and several to choose from.
        """
        names = sorted(self.manifest.profiles)
        if profile is None and len(names) == 1:
            profile = names[0]
        if profile not in self.manifest.profiles:
            said = "say which profile" if profile is None else f"no profile {profile!r}"
            choices = "".join(f", and {name} chooses per input" for name in sorted(self.manifest.choices))
            raise UserError(f"{self.directory}: {said}; it holds {', '.join(names)}{choices}")
        return profile, self.manifest.profiles[profile]

    def named(self, name: str | None = None) -> list[str]:
        """Profiles and choices behind a name: itself, or one for each grid of images that it is there for.

        Raises:
            UserError: as `entry`.
        """
        known = {*self.manifest.profiles, *self.manifest.choices}
        plain = {each.partition("@")[0] for each in self.manifest.profiles}
        name = next(iter(plain)) if name is None and len(plain) == 1 else name
        if name in known:
            return [name]
        return sorted(each for each in known if each.partition("@")[0] == name) or [self.entry(name)[0]]

    def members(self, name: str | None = None) -> list[str]:
        """Profiles behind a name: those of a choice, or the profile itself.

        Raises:
            UserError: as `entry`.
        """
        choice = self.manifest.choices.get(name or "")
        return list(choice.members) if choice else [self.entry(name)[0]]

    def profile(self, name: str | None = None) -> Profile:
        """The Profile itself.

        Raises:
            UserError: as `entry`; or its file is damaged.
        """
        _, entry = self.entry(name)
        data = self.path(entry.profile).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[entry.profile].sha256:
            raise UserError(self._damage(entry.profile))
        return to_profile(msgspec.json.decode(data), source=entry.profile)

    def damaged(self, advance: Callable[[str], None] = lambda name: None) -> list[str]:
        """Every file whose SHA-256, taken afresh, is not the recorded one; `advance` is called after each."""
        found = []
        for name, file in self.manifest.files.items():
            if not is_whole(self.path(name), file, fresh=True):
                found.append(name)
            advance(name)
        return found

    def verify(self) -> None:
        """Compares every file with its recorded SHA-256, also those that were compared before.

        Raises:
            UserError: naming the first file that differs.
        """
        for name in self.damaged():
            raise UserError(self._damage(name))


def rebuild(directory: Path, engine: Engine, profile: str) -> str:
    """The command that makes an engine anew."""
    asked = engine.asked or f"--target {engine.target}"
    return f"build it again with trimvlm build {directory} {asked} --profile {profile}"


def visible_files(directory: Path) -> Iterator[str]:
    """Names of all files of a bundle but the hidden ones: locks, timing caches, files being written."""
    for path, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(path, name).is_symlink()]
        for name in sorted([*names, *linked]):
            if not name.startswith("."):
                yield Path(path, name).relative_to(directory).as_posix()
