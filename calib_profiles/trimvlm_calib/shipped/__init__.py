"""Profiles that come with trimvlm: layer lists and schedules as published, one geometry each.

Each is a YAML file here, named after its profile. None carries a fingerprint: what was published holds for
the architecture, not for certain weights. Profiles of LLaVA-NeXT are for its 2x2 tile grid with 2880 visual
tokens, without newline tokens and padding, as the papers count; any other grid is another number of tokens.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm_calib.files import load_profile


def names() -> list[str]:
    """Names of the shipped profiles, in order."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> Profile:
    """A shipped profile.

    Raises:
        UserError: there is none of that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "trimvlm import --list shows them"
        raise UserError(f"no shipped profile {name!r}; {hint}")
    return load_profile(Path(__file__).with_name(f"{name}.yaml"))


def load_file_or_shipped(text: str) -> Profile:
    """The profile in a file, or the shipped one of that name; a file goes first.

    Raises:
        UserError: there is neither, or the file is not a profile.
    """
    if Path(text).exists() or Path(text).suffix or len(Path(text).parts) > 1:
        return load_profile(text)
    return load(text)
