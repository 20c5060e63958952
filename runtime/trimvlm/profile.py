"""A Profile: the calibrated static pruning configuration of one model.

Values only: frozen, validated at construction, unknown keys refused with the path of the bad field.
What the decisions mean for a given layer is `schedule.py`. On disk a Profile is YAML on the workstation
(`trimvlm_calib.files`) and JSON inside a Bundle (here), so that a device needs no YAML parser.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
from trimvlm.router_spec import RouterSpec
from trimvlm.rules import SelectionRule
from trimvlm.value import Value

SCHEMA = 1

Rows: TypeAlias = Literal["live", "none"]
ActiveRows: TypeAlias = Literal["live", "none", "unskipped"]
TextKeys: TypeAlias = Literal["live", "none", "sink"]
Execute: TypeAlias = Literal["both", "decode", "none"]
Grid: TypeAlias = tuple[int, int]
Sublayers: TypeAlias = Literal["both", "attention", "ffn"]


class ModelSpec(Value, frozen=True, kw_only=True):
    """Geometry and identity of the model that a Profile was made for.

    Attributes:
        family: transformers' `model_type` of the whole model, e.g. `llava`.
        fingerprint: SHA-256 over the checkpoint's weight files, or None for a published layer list that
            holds for every checkpoint of this geometry.
        layers: decoder layers L.
        hidden: model width D.
        heads, kv_heads, head_dim: attention heads H, key/value heads G, and the size C of one head.
        ffn: FFN width F (gated: three matrices).
        vocab: vocabulary size V.
        visual_tokens: visual rows that one image gives, N.
        grid: rows and columns of visual tokens that an image covers, where images of different shapes give
            different ones; without the tokens of an overview of the whole image and those that end a row.
            None: every image is one view of a fixed size.
        mrope: rotary angles follow three coordinates (time, row, column) instead of one position (Qwen2-VL,
            section 2.1).
    """

    family: str
    fingerprint: str | None = None
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    visual_tokens: int
    grid: Grid | None = None
    mrope: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "visual_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}: {getattr(self, field)} is not a positive count")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads: {self.kv_heads} does not divide {self.heads} heads")

    def named(self, name: str) -> str:
        """`name@RxC` for a grid of R rows and C columns, or `name`."""
        return f"{name}@{self.grid[0]}x{self.grid[1]}" if self.grid else name


class Select(Value, frozen=True, kw_only=True):
    """At the input of `layer`, shrink the live visual rows to the `keep` best per image.

    Survivors keep their original order and ties go to the lower index. With m images the budget is
    m * keep over all of them together. `cross_and_self_attention` selects inside the layer, see there.
    """

    layer: int
    keep: int
    by: SelectionRule


class SkipStage(Value, frozen=True, kw_only=True):
    """From `layer` on, `count` visual rows of each image are in skip mode."""

    layer: int
    count: int


class SkipMode(Value, frozen=True, kw_only=True):
    """SPIDER's ASL-Skip, staged: visual rows enter skip mode, for good, at fixed layers in fixed numbers.

    In skip mode a row bypasses the sub-layers whose rule is `unskipped`. At each stage every live row's
    accumulator grows by ReLU(1 - R), R the sum of the terms that are on, each scaled to 0..1 over the live
    visual rows by its least and greatest value (a constant term is 0). The rows that skip already stay, and
    those with the highest accumulator join them; ties go to the lower index.

    Attributes:
        stages: in layer order, counts not falling.
        entropy: the term E: entropy of softmax(h W^T) with W the LM head, h the stage's input, no final norm.
        correlation: the term F: cosine of h with the mean of the text rows' h.
    """

    stages: tuple[SkipStage, ...]
    entropy: bool = True
    correlation: bool = True

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("skip.stages: at least one")
        if not (self.entropy or self.correlation):
            raise UserError("skip: entropy and correlation are both off, nothing ranks the rows")


class LayerRule(Value, frozen=True, kw_only=True):
    """What differs from the default in some layers. A field left out says nothing (default: live, both).

    Attributes:
        layers: 0-based layer numbers.
        query: visual rows that compute Q, attention and O (`none`: V-Skip, ShortV; `unskipped`: ASL-Skip).
        text_keys: visual keys that text rows see at prefill; what decode sees is `cache`. `sink`: all the
            weight that a text row gives to visual keys goes to the value of the first live one (VisiPruner).
        visual_keys: visual keys that visual rows see.
        ffn: visual rows that run the FFN.
        cache: visual keys and values kept for decode.
        execute: `none` skips the whole layer, for all rows, at prefill and decode; `decode` skips it at
            prefill only, which still writes keys and values of all rows from the unchanged input (ShortGPT
            for generation).
        sublayers: which sub-layers there are, for all rows (LLM-Drop); a layer without attention has no
            keys and values.
    """

    layers: tuple[int, ...]
    query: ActiveRows | None = None
    text_keys: TextKeys | None = None
    visual_keys: Rows | None = None
    ffn: ActiveRows | None = None
    cache: Rows | None = None
    execute: Execute | None = None
    sublayers: Sublayers | None = None


class Decisions(Value, frozen=True, kw_only=True):
    """The static decisions, as small as they can be said.

    Attributes:
        encoder: what reduces the visual rows before the decoder, or None.
        inject: first layer whose input holds visual rows (HiDivDrop: late injection of the raw projector
            outputs); 0 is the ordinary model.
        exit: first layer without visual rows (VTW, HiDivDrop); None: they stay to the end.
        select: selection stages in layer order.
        skip: rows in skip mode, or None.
        layers: per-layer exceptions.
        positions: `persistent`: survivors keep their ids; `compact`: ids are renumbered after each drop.
        mask: how hidden visual keys are hidden: `additive` (before the softmax) or `post_softmax` (zeroed
            after it, without renormalising: VisiPruner).
    """

    encoder: EncoderStage | None = None
    inject: int = 0
    exit: int | None = None
    select: tuple[Select, ...] = ()
    skip: SkipMode | None = None
    layers: tuple[LayerRule, ...] = ()
    positions: Literal["persistent", "compact"] = "persistent"
    mask: Literal["additive", "post_softmax"] = "additive"


class Method(Value, frozen=True, kw_only=True):
    """Which published algorithm made the decisions, and its parameters."""

    name: str
    parameters: dict[str, Any] = {}


class Calibration(Value, frozen=True, kw_only=True):
    """Where the decisions come from.

    Attributes:
        data: name of the calibration set.
        samples: how many samples were used.
        seed: what the order of the samples was drawn with.
        curves: what was measured: name to one value per layer (None where not measured).
    """

    data: str
    samples: int
    seed: int
    curves: dict[str, tuple[float | None, ...]] = {}


class Profile(Value, frozen=True, kw_only=True):
    """A pruning profile. See the module's text; `docs/profile.md` shows one in full.

    Attributes:
        router: what scores tokens for selections by `router`, and layers for a choice; its weights lie in a
            file of their own.
        choice: profiles of one bundle with the same choice and router are members among which the runtime
            takes one for each input, by the layers that they execute.
    """

    schema: Literal[1] = SCHEMA
    name: str
    method: Method
    model: ModelSpec
    decisions: Decisions = Decisions()
    router: RouterSpec | None = None
    choice: str | None = None
    calibration: Calibration | None = None
    needs_adapted_weights: bool = False
    notes: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.router is not None and self.router.first >= self.model.layers:
            raise UserError(
                f"router.first: layer {self.router.first} is not within 0..{self.model.layers - 1}"
            )
        if self.choice is not None:
            check_name(self.choice)
            if self.router is None or self.choice == self.name:
                raise UserError(f"choice: {self.choice!r} needs a router, and a name that no profile has")

    @property
    def key(self) -> str:
        """Its name in a bundle: with the grid where images have one."""
        return self.model.named(self.name)

    @property
    def digest(self) -> str:
        """SHA-256 over the whole Profile in canonical JSON: what an engine is bound to."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


def check_name(name: str) -> None:
    """Refuses a profile name that cannot name files.

    Raises:
        UserError: naming the name and what is allowed.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9+-]*", name):
        raise UserError(f"name: {name!r} cannot name files; use lower-case letters, digits, '-' and '+'")


def to_profile(data: Any, *, source: str) -> Profile:
    """Converts plain data (parsed YAML or JSON) to a Profile.

    Raises:
        UserError: naming `source`, the path of the bad field and what was expected.
    """
    try:
        return msgspec.convert(data, Profile, strict=True)
    except (msgspec.ValidationError, UserError) as error:
        raise UserError(f"{source}: not a profile of schema {SCHEMA}: {error}") from None


def check_fits(profile: Profile, model: ModelSpec) -> None:
    """Refuses to apply a Profile to a model it was not made for.

    Raises:
        UserError: naming the first field that differs and both values.
    """
    for field in ModelSpec.__struct_fields__:
        wanted, found = getattr(profile.model, field), getattr(model, field)
        if wanted == found or (field == "fingerprint" and wanted is None):
            continue
        raise UserError(
            f"profile {profile.name}: model.{field} is {wanted}, but this model has {found}; "
            f"calibrate a profile for this model (trimvlm calibrate)"
        )


def layer_numbers(layers: Sequence[int]) -> str:
    """Layer numbers for people: `0, 3-5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
