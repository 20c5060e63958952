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

from trimvlm.errors import UserError

SCHEMA = 1

Rows: TypeAlias = Literal["live", "none"]


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every value here: frozen, unknown keys refused. A class says `frozen` and `kw_only` again:
    msgspec does not inherit the second, type checkers not the first."""


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

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "visual_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}: {getattr(self, field)} is not a positive count")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads: {self.kv_heads} does not divide {self.heads} heads")


class LastRowAttention(Value, frozen=True, kw_only=True, tag_field="rule", tag="last_row_attention"):
    """Rank visual tokens by the last prompt row's attention to them, mean over heads, in fp32.

    Attributes:
        attention: `previous`: the attention of the layer before (FastV); `own`: an auxiliary attention
            with this layer's own input norm, Wq and Wk, over the rows that enter it (PyramidDrop,
            HiDivDrop section 3.3).
    """

    attention: Literal["previous", "own"]


class Select(Value, frozen=True, kw_only=True):
    """At the input of `layer`, shrink the live visual rows to the `keep` best per image.

    Survivors keep their original order and ties go to the lower index. With m images the budget is
    m * keep over all of them together.
    """

    layer: int
    keep: int
    by: LastRowAttention


class LayerRule(Value, frozen=True, kw_only=True):
    """What differs from the default in some layers. A field left out says nothing (default: live, both).

    Attributes:
        layers: 0-based layer numbers.
        query: visual rows that compute Q, attention and O (`none`: V-Skip, ShortV).
        text_keys: visual keys that text rows see at prefill; what decode sees is `cache`.
        visual_keys: visual keys that visual rows see.
        ffn: visual rows that run the FFN.
        cache: visual keys and values kept for decode.
        execute: `none` skips the whole layer, for all rows, at prefill and decode.
    """

    layers: tuple[int, ...]
    query: Rows | None = None
    text_keys: Rows | None = None
    visual_keys: Rows | None = None
    ffn: Rows | None = None
    cache: Rows | None = None
    execute: Literal["both", "none"] | None = None


class Decisions(Value, frozen=True, kw_only=True):
    """The static decisions, as small as they can be said.

    Attributes:
        inject: first layer whose input holds visual rows (HiDivDrop: late injection of the raw projector
            outputs); 0 is the ordinary model.
        exit: first layer without visual rows (VTW, HiDivDrop); None: they stay to the end.
        select: selection stages in layer order.
        layers: per-layer exceptions.
        positions: `persistent`: survivors keep their ids; `compact`: ids are renumbered after each drop.
        mask: how hidden visual keys are hidden: `additive` (before the softmax) or `post_softmax` (zeroed
            after it, without renormalising: VisiPruner).
    """

    inject: int = 0
    exit: int | None = None
    select: tuple[Select, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    positions: Literal["persistent", "compact"] = "persistent"
    mask: Literal["additive", "post_softmax"] = "additive"


class VisionTaps(Value, frozen=True, kw_only=True):
    """Extra outputs of the vision graph that encoder-side methods need.

    Attributes:
        cls_attention: 0-based tower layers whose [CLS] row of attention (mean over heads) is wanted.
        features: tower hidden states wanted, numbered as Hugging Face's `hidden_states` (0: embeddings).
    """

    cls_attention: tuple[int, ...] = ()
    features: tuple[int, ...] = ()


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
    """A pruning profile. See the module's text; `docs/profile.md` shows one in full."""

    schema: Literal[1] = SCHEMA
    name: str
    method: Method
    model: ModelSpec
    decisions: Decisions = Decisions()
    vision_taps: VisionTaps = VisionTaps()
    calibration: Calibration | None = None
    needs_adapted_weights: bool = False
    notes: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)

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
