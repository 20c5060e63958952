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
    <profile>.profile.json
    <profile>.goldens.json            what the reference computed, for `trimvlm check`
    <profile>.<target>.engine         plans written by `trimvlm build`

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
import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.image_processing import ImageProcessing
from trimvlm.profile import ModelSpec, Profile, to_profile
from trimvlm.router_spec import Choice
from trimvlm.value import Value

FORMAT = 2
MANIFEST = "manifest.json"

Lowering = Literal["fused", "primitive"]
Dtype = Literal["float32", "float16", "bfloat16"]


class PromptTemplate(Value, frozen=True, kw_only=True):
    """The checkpoint's chat template, frozen to pieces of text.

    A conversation is `start`, then per turn `user_start`, one `image` per image, `text_start`, the text,
    `user_end`, and for an answered turn `answer_start`, the answer, `answer_end`; at the end `generate`.
    """

    start: str
    user_start: str
    image: str
    text_start: str = ""
    user_end: str
    answer_start: str
    answer_end: str
    generate: str


class TextProcessing(Value, frozen=True, kw_only=True):
    """Tokenization: the tokenizer file and the ids that the runtime must know."""

    tokenizer: str
    image_token: str
    image_token_id: int
    eos_ids: tuple[int, ...]
    template: PromptTemplate


class File(Value, frozen=True, kw_only=True):
    """A file of the bundle, for verification."""

    bytes: int
    sha256: str


class Engine(Value, frozen=True, kw_only=True):
    """What `trimvlm build` made for one Target, and what it is bound to.

    Attributes:
        target: the Target's name.
        backend: the library that runs it and the exact version that built it.
        graphs: role (`vision`, `projector`, `router`, `decoder`) to the file that the backend loads: a plan,
            or for ONNX Runtime the graph itself.
        profile_digest: `Profile.digest` at build time.
        options: builder options and shape ranges, for people and for staleness checks.
        measured: bytes and seconds of the build.
    """

    target: str
    backend: str
    version: str
    graphs: dict[str, str]
    profile_digest: str
    options: dict[str, Any] = {}
    measured: dict[str, float] = {}


class Entry(Value, frozen=True, kw_only=True):
    """One profile of the bundle.

    Attributes:
        model: what it is for; entries differ in the grid of the images, and in what follows from it.
        tower: of one view.
        profile, vision, decoders, goldens: files.
        projector: there where the profile has an encoder stage.
        router: there where the profile has one.
    """

    model: ModelSpec
    tower: Tower
    profile: str
    vision: str
    projector: str | None = None
    router: str | None = None
    decoders: dict[Lowering, str]
    goldens: str | None = None
    engines: dict[str, Engine] = {}


class Manifest(Value, frozen=True, kw_only=True):
    """Everything that a device must know, without torch, transformers or YAML.

    Attributes:
        fingerprint: of the checkpoint.
        profiles: by name; `name@RxC` where images have grids, of R rows and C columns.
    """

    format: Literal[2] = FORMAT
    producer: str
    fingerprint: str
    dtype: Dtype
    image: ImageProcessing
    text: TextProcessing
    weights: tuple[str, ...]
    ignored_tensors: dict[str, str]
    profiles: dict[str, Entry]
    choices: dict[str, Choice] = {}
    files: dict[str, File]


class Bundle:
    """A bundle on disk: its manifest, and paths that are known to exist.

    Raises (on open):
        UserError: no bundle there, an unknown format, a path that leaves the directory, a missing file or a
            file of the wrong size.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.is_file():
            raise UserError(f"{self.directory}: no {MANIFEST} here; make a bundle with trimvlm export")
        try:
            self.manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (msgspec.DecodeError, UserError) as error:
            raise UserError(f"{path}: not a bundle manifest of format {FORMAT}: {error}") from None
        for name, file in self.manifest.files.items():
            size = self.path(name).stat().st_size if self.path(name).is_file() else None
            if size != file.bytes:
                raise UserError(
                    f"{self.directory}: {name} "
                    f"{'is missing' if size is None else f'has {size} bytes, not {file.bytes}'}; "
                    "copy the bundle again or export it again"
                )

    def path(self, name: str) -> Path:
        """Path of a file named in the manifest."""
        path = (self.directory / name).resolve()
        if not path.is_relative_to(self.directory.resolve()):
            raise UserError(f"{self.directory}: {name} leads out of the bundle")
        return path

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
        """The Profile itself."""
        _, entry = self.entry(name)
        return to_profile(msgspec.json.decode(self.path(entry.profile).read_bytes()), source=entry.profile)

    def verify(self) -> None:
        """Compares every file with its recorded SHA-256.

        Raises:
            UserError: naming the first file that differs.
        """
        for name, file in self.manifest.files.items():
            if sha256(self.path(name)) != file.sha256:
                raise UserError(f"{self.directory}: {name} is damaged (SHA-256 differs); copy it again")


def sha256(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record(path: Path) -> File:
    """Size and SHA-256 of a file."""
    return File(bytes=path.stat().st_size, sha256=sha256(path))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all (temporary name, fsync, rename)."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, indented for people."""
    encoded = msgspec.json.encode(manifest, order="deterministic")
    write_whole(directory / MANIFEST, msgspec.json.format(encoded, indent=2) + b"\n")
