"""The manifest of a Bundle (`trimvlm.bundle`): its types, and how it is read and written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.files import File, write_whole
from trimvlm.image_processing import ImageProcessing
from trimvlm.profile import ModelSpec
from trimvlm.router_spec import Choice
from trimvlm.value import Value

FORMAT = 3
MANIFEST = "manifest.json"
ENGINE = ".engine"  # how names of plans end
WEIGHT_KINDS = ("quantized", "padded")  # of a build's `weights.<kind>.*`, and keys of an Engine's options
LARGEST = 64 << 20  # bytes; a hundred profiles with their engines take one

_ZEROS = "0" * 64
# Byte for byte, as `write_manifest` lays it out: everything outside the checksum is under it.
_CHECKSUM = re.compile(rb'\{\n  "format": \d+,\n  "checksum": "(?P<checksum>[0-9a-f]{64})",\n')

Lowering = Literal["fused", "primitive"]
DecoderGraph = Literal["fused", "in_place", "primitive", "fused.filled", "primitive.filled"]
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


class Engine(Value, frozen=True, kw_only=True):
    """What `trimvlm build` made for one Target, and what it is bound to.

    Attributes:
        target: the Target's name.
        asked: how `trimvlm build` was asked for it, e.g. `--target ./my-board.yaml`; empty: by that name.
        backend: the library that runs it and the exact version that built it.
        compute_capability: SM of the GPU that its plans are for.
        system: operating system that its plans were built on, see `trimvlm.machine`; None where there are no
            plans.
        graphs: role (`vision`, `projector`, `router`, `decoder`, of blocks of layers `decoder.0`, ...) to the
            file that the backend loads: a plan, or for ONNX Runtime the graph itself.
        profile_digest: `Profile.digest` at build time.
        options: by role, all that went into a file: graph and weights by their hashes, shape ranges, builder
            options; of a plan also its own hash; as `piece` the graph that it was made of, where the build
            wrote one (`trimvlm_engines.splitting`).
        measured: of the build, by part: bytes, seconds, peak memory; `weights_ratio`: plans over the weights.
    """

    target: str
    asked: str = ""
    backend: str
    version: str
    compute_capability: str | None = None
    system: str | None = None
    graphs: dict[str, str]
    profile_digest: str
    options: dict[str, Any] = {}
    measured: dict[str, float] = {}

    @property
    def made(self) -> set[str]:
        """Files that the build wrote: plans and pieces of graphs."""
        pieces = {options["piece"] for options in self.options.values() if "piece" in options}
        for kind in WEIGHT_KINDS:
            pieces |= {each[kind]["file"] for each in self.options.values() if kind in each}
        return pieces | {file for file in self.graphs.values() if file.endswith(ENGINE)}


class Entry(Value, frozen=True, kw_only=True):
    """One profile of the bundle.

    Attributes:
        model: what it is for; entries differ in the grid of the images, and in what follows from it.
        tower: of one view.
        profile, vision, goldens: files.
        decoders: files by lowering; without empty tensors (`trimvlm.filling`) where they were exported.
        projector: there where the profile has an encoder stage.
        router: there where the profile has one.
    """

    model: ModelSpec
    tower: Tower
    profile: str
    vision: str
    projector: str | None = None
    router: str | None = None
    decoders: dict[DecoderGraph, str]
    goldens: str | None = None
    engines: dict[str, Engine] = {}

    @property
    def references(self) -> list[str]:
        """Every file that it names."""
        some = self.projector, self.router, self.goldens
        built = (file for engine in self.engines.values() for file in {*engine.graphs.values(), *engine.made})
        return [self.profile, self.vision, *filter(None, some), *self.decoders.values(), *built]


class Manifest(Value, frozen=True, kw_only=True):
    """Everything that a device must know, without torch, transformers or YAML.

    Attributes:
        checksum: SHA-256 of the file that it was read from, taken with zeros in the checksum's place.
        fingerprint: of the checkpoint.
        profiles: by name; `name@RxC` where images have grids, of R rows and C columns.
    """

    format: Literal[3] = FORMAT
    checksum: str = _ZEROS
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

    @property
    def references(self) -> list[str]:
        """Every file that it names; all of them must be in `files`."""
        profiles = (file for entry in self.profiles.values() for file in entry.references)
        return [self.text.tokenizer, *self.weights, *profiles]


def read_manifest(directory: Path) -> Manifest:
    """Reads `manifest.json`; its checksum is compared before it is decoded.

    Raises:
        UserError: none there, another format, one that was changed or damaged, or a path that leaves the
            directory.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory}: no {MANIFEST} here; make a bundle with trimvlm export")
    if path.is_symlink():
        raise UserError(f"{path}: is a link; copy the bundle with the files themselves")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path}: {size} bytes are more than any manifest has ({LARGEST}); copy it again")
    data = path.read_bytes()
    found = _CHECKSUM.match(data)
    if not found:
        raise UserError(
            f"{path}: not a bundle manifest of format {FORMAT}, or damaged at its beginning; export again "
            "with this version of trimvlm, or copy it again"
        )
    if hashlib.sha256(_with_checksum(data, _ZEROS)).hexdigest().encode() != found["checksum"]:
        raise UserError(
            f"{path}: damaged or changed since it was written (its checksum differs); copy it again or "
            "export it again"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UserError) as error:
        raise UserError(f"{path}: not a bundle manifest of format {FORMAT}: {error}") from None
    _check_names(directory, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, indented for people, with its checksum."""
    plain = msgspec.structs.replace(manifest, checksum=_ZEROS)
    data = msgspec.json.format(msgspec.json.encode(plain, order="deterministic"), indent=2) + b"\n"
    write_whole(directory / MANIFEST, _with_checksum(data, hashlib.sha256(data).hexdigest()))


def _with_checksum(data: bytes, checksum: str) -> bytes:
    found = _CHECKSUM.match(data)
    assert found
    return data[: found.start("checksum")] + checksum.encode() + data[found.end("checksum") :]


def _check_names(directory: Path, manifest: Manifest) -> None:
    for name in (*manifest.files, *manifest.references):
        parts = name.split("/")
        if not name or {"", ".", ".."} & set(parts) or any(letter in name for letter in "\\:\0"):
            raise UserError(
                f"{directory}: {name!r} leads out of the bundle; copy it again from where it is whole"
            )
    for name in manifest.references:
        if name not in manifest.files:
            raise UserError(
                f"{directory}: {name} is used, but {MANIFEST} has no size and hash of it; export again"
            )
