"""What a published checkpoint looks like, as data: one YAML per model in `models/`, or a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from trimvlm.errors import UserError
from trimvlm.value import Value

SHIPPED = Path(__file__).parent / "models"
Dtype = Literal["float32", "float16", "bfloat16"]


class TokenizerDescription(Value, frozen=True, kw_only=True):
    """The published tokenizer's ids; its words are not kept, so text is a token per character or byte.

    Attributes:
        kind: sentencepiece (Llama) or byte_level (Qwen).
        special: special tokens, each at its exact id; ids between that nothing takes are filler words.
        bos, eos, pad, unk: which of them are the beginning, end, padding and unknown token.
        bos_first: every text begins with `bos`.
        attributes: names that the processor looks tokens up by, such as `context_image_token`.
    """

    kind: Literal["sentencepiece", "byte_level"]
    special: dict[str, int]
    eos: str
    pad: str
    bos: str | None = None
    unk: str | None = None
    bos_first: bool = False
    attributes: dict[str, str] = {}

    def __post_init__(self) -> None:
        roles = [token for token in (self.bos, self.eos, self.pad, self.unk) if token]
        for token in (*roles, *self.attributes.values()):
            if token not in self.special:
                raise UserError(f"tokenizer: {token!r} is not among `special`; add it with its id")
        if len(set(self.special.values())) < len(self.special) or min(self.special.values()) < 0:
            raise UserError("tokenizer.special: every token needs an id of its own, from 0")
        if self.bos_first and not self.bos:
            raise UserError("tokenizer.bos_first: there is no `bos`; name it, or leave bos_first out")


class Description(Value, frozen=True, kw_only=True):
    """A published checkpoint without its weights.

    Attributes:
        source: where the values were read.
        dtype: what the weights are published in.
        shard_gb: no weight file is larger, in 10^9 bytes.
        published_names: (pattern, replacement) pairs, in order: from the names that transformers 5 saves to
            those of the published files; empty where they are the same.
        config, preprocessor, processor, generation: the contents of `config.json`,
            `preprocessor_config.json`, `processor_config.json` (none where empty), `generation_config.json`.
        chat_template: Jinja; renders what the published one renders for text and images.
    """

    name: str
    source: str
    dtype: Dtype
    shard_gb: float
    published_names: tuple[tuple[str, str], ...] = ()
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    processor: dict[str, Any] = {}
    generation: dict[str, Any]
    tokenizer: TokenizerDescription
    chat_template: str

    def __post_init__(self) -> None:
        if self.shard_gb <= 0:
            raise UserError(f"shard_gb: {self.shard_gb} is not a size; give 10^9 bytes, for example 5")


def shipped() -> list[Description]:
    """All shipped descriptions, by name."""
    return [_parse(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def load(name_or_path: str) -> Description:
    """A description by the name of a shipped one, or by the path of a YAML file.

    Raises:
        UserError: unknown name (listing the known ones), not YAML, an unknown or wrong field.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return _parse(Path(name_or_path))
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if name_or_path not in names:
        raise UserError(
            f"no model {name_or_path!r}; known are {', '.join(names)}, and any path to a .yaml of your own"
        )
    return _parse(SHIPPED / f"{name_or_path}.yaml")


def _parse(path: Path) -> Description:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file; trimvlm synthesize lists the shipped models")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        return msgspec.convert(data, Description, strict=True)
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError, UserError) as error:
        raise UserError(f"{path}: not a model's description: {' '.join(str(error).split())}") from None
