"""Profiles as YAML files, for people to read and to edit.

Fields at their default are left out, and short lists stay on one line. Inside a Bundle a Profile is JSON
(`trimvlm.profile`), so that a device needs no YAML parser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from trimvlm.bundle import write_whole
from trimvlm.errors import UserError
from trimvlm.profile import Profile, to_profile
from trimvlm_export.router_weights import find_weights


def load_profile(path: Path | str) -> Profile:
    """Reads a Profile.

    Raises:
        UserError: no such file, not YAML, not a Profile, or its router's weights are not beside it; the
            message names the file and the field.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; trimvlm calibrate writes profiles") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    profile = to_profile(data, source=str(path))
    find_weights(profile, path.parent)
    return profile


def save_profile(profile: Profile, path: Path | str) -> None:
    """Writes a Profile; the file is there whole or not at all."""
    data = {"schema": profile.schema, **_without_defaults(profile)}
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    write_whole(Path(path), text.encode())


def _without_defaults(value: Any) -> Any:
    """Plain data of a value; in structs, fields at their default are left out."""
    if isinstance(value, msgspec.Struct):
        plain = {
            field.name: _without_defaults(getattr(value, field.name))
            for field in msgspec.structs.fields(value)
            if getattr(value, field.name) != _default(field)
        }
        config = value.__struct_config__
        return {config.tag_field: config.tag, **plain} if config.tag_field else plain
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_defaults(item) for item in value]
    return value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    """What the field holds if left out; `msgspec.NODEFAULT` where it may not be."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line; lists below their key are indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


class _StrictLoader(yaml.SafeLoader):
    """YAML's last of two equal keys wins silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is said twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
