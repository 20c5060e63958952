"""Targets: one YAML per device in `targets/`, discovered by looking there; or a user's own YAML, by path."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import msgspec

from trimvlm.errors import UserError
from trimvlm.target import Target, Tested, Weights

SHIPPED = Path(__file__).parent / "targets"
DEFAULT = "ort-cpu"
# What may follow a shipped target's name: longer rows; bits of weights, of activations, block.
PADDED = "-padded"
QUANTIZED = re.compile(r"(?P<name>.+)-int(?P<bits>4|8)(?P<a8>a8)?(?:x(?P<block>16|32|64|128))?")


def load(name_or_path: str | Path) -> Target:
    """A Target by the name of a shipped device, or by the path of a YAML file.

    Raises:
        UserError: unknown name (listing the known ones), unreadable YAML, unknown key, impossible target.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        return parse(Path(text))
    names = _names()
    if (name := text.removesuffix(PADDED)) in names and text not in names:
        return padded(parse(SHIPPED / f"{name}.yaml"))
    said = QUANTIZED.fullmatch(text)
    if said and said["name"] in names and text not in names:
        given = {"bits": int(said["bits"])} | ({"activations": "int8"} if said["a8"] else {})
        given |= {"block": int(said["block"])} if said["block"] else {}
        return quantized(parse(SHIPPED / f"{said['name']}.yaml"), msgspec.convert(given, Weights))
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"no target {text!r}; {hint}known are {', '.join(names)}, each also with -int4 or -int8 behind "
            "it (then a8: activations in int8; then x16, x32, x64 or x128: block), ort-cpu also with "
            f"{PADDED}, and any path to a .yaml of your own"
        )
    return parse(SHIPPED / f"{text}.yaml")


def quantized(target: Target, weights: Weights) -> Target:
    """The same device with quantised weights. What was done on it was done without."""
    kind = f"{weights.bits}{'a8' if weights.activations == 'int8' else ''}"
    kind += "" if weights.block == Weights(bits=weights.bits).block else f"x{weights.block}"
    return msgspec.structs.replace(target, name=f"{target.name}-int{kind}", weights=weights, tested=Tested())


def padded(target: Target) -> Target:
    """The same device with rows a cache line longer. What was done on it was done without."""
    return msgspec.structs.replace(target, name=f"{target.name}{PADDED}", padded=True, tested=Tested())


def shipped() -> list[Target]:
    """All shipped targets, by name."""
    return [parse(SHIPPED / f"{name}.yaml") for name in _names()]


def parse(path: Path) -> Target:
    """Reads one YAML file.

    Raises:
        UserError: naming the file, the field and what was expected.
    """
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such target file; trimvlm targets lists the shipped ones")
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Target, strict=True)
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError, UserError) as error:
        raise UserError(f"{path}: not a target: {' '.join(str(error).split())}") from None


def _names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
