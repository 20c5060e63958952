"""Other tools' pruning configurations as Profiles, one file per format.

A format is a module of this package with

    FORMAT     on the command line
    SUMMARY    one line: what is read
    read(text, model) -> (Method, Decisions)

Modules are found by being here; no table lists them. What a format can say and a Profile cannot is an error
that names the key: nothing is left out silently.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, ModelSpec, Profile, check_name
from trimvlm.schedule import resolve

if TYPE_CHECKING:
    from trimvlm.encoder_rules import Tower


class Target:
    """The model that a configuration is imported for."""

    def __init__(self, checkpoint: Path | str) -> None:
        from trimvlm_export.checkpoint import model_spec

        self.checkpoint = checkpoint
        self.spec: ModelSpec = model_spec(checkpoint)

    @property
    def tower(self) -> Tower:
        """Its vision tower; only what reads it needs one that trimvlm knows."""
        from trimvlm_export.checkpoint import tower

        return tower(self.checkpoint)


class Format(Protocol):
    """What a format module offers."""

    FORMAT: str
    SUMMARY: str

    def read(self, text: str, model: Target) -> tuple[Method, Decisions]:
        """Maps a file's text to decisions for `model`."""
        ...


def discover() -> dict[str, Format]:
    """Every format here, by name."""
    found = [
        importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
    ]
    return {module.FORMAT: cast(Format, module) for module in found}


def import_profile(file: Path | str, format_: str, checkpoint: Path | str, name: str) -> Profile:
    """Reads another tool's configuration as a Profile of `checkpoint`.

    Raises:
        UserError: an unknown format, a file that is not of it, a key that no decision corresponds to, or
            decisions that this model cannot follow. The message names file and key.
    """
    formats, file = discover(), Path(file)
    if format_ not in formats:
        raise UserError(f"--format: {format_!r} is not one of {', '.join(formats)}")
    check_name(name)
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    model = Target(checkpoint)
    try:
        method, decisions = formats[format_].read(text, model)
        resolve(decisions, model.spec)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return Profile(
        name=name,
        method=method,
        model=model.spec,
        decisions=decisions,
        notes=f"Imported from {file.name} ({format_}).",
    )


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


class Keys:
    """A mapping whose keys must all be read: what is left over is what cannot be mapped.

    Args:
        data: the mapping as it was parsed.
        path: where it lies in the file, for errors.
    """

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, dict):
            raise UserError(f"{path or 'the file'}: a mapping is needed, found {data!r}")
        self._data, self._path, self._read = data, path, set[str]()

    def where(self, key: str) -> str:
        """The key with its path."""
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The key's value.

        Args:
            kind: what it must be; an int is taken for a float.
            default: if the key is missing; None: it may not be.

        Raises:
            UserError: it is missing, or of another kind.
        """
        self._read.add(key)
        if key not in self._data:
            if default is None:
                raise UserError(f"{self.where(key)}: is missing")
            return default
        value = self._data[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where(key)}: {KINDS[kind]} is needed, found {value!r}")
        return value

    def ignore(self, *keys: str) -> None:
        """Keys that have nothing to do with pruning."""
        self._read.update(keys)

    def rest(self) -> dict[str, Any]:
        """What was read, as it stands in the file."""
        return {key: value for key, value in self._data.items() if key in self._read}

    def finish(self) -> None:
        """Raises UserError for the first key that was not read."""
        for key in self._data:
            if key not in self._read:
                raise UserError(
                    f"{self.where(str(key))}: no decision of a profile corresponds to it; remove it if it "
                    "has no effect on pruning"
                )
