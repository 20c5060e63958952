"""What a calibration makes: a Profile, or several among which the runtime chooses, and a router's weights."""

from __future__ import annotations

from pathlib import Path

from trimvlm.bundle import write_whole
from trimvlm.profile import Profile
from trimvlm.value import Value
from trimvlm_calib.files import save_profile
from trimvlm_calib.outcome import TrainedRouter


class Calibrated(Value, frozen=True, kw_only=True):
    """All that belongs together on disk.

    Attributes:
        profiles: one, or the members of a choice.
        router: what their `router` names.
    """

    profiles: tuple[Profile, ...]
    router: TrainedRouter | None = None


def save_calibrated(made: Calibrated, path: Path) -> list[Path]:
    """Writes a Profile to `path`; members of a choice beside it, under their own names.

    A router's weights are written first: a Profile on disk has its router.

    Returns:
        The Profiles' files.
    """
    from trimvlm_export.router_weights import encode

    if made.router is not None:
        spec = made.profiles[0].router
        assert spec is not None
        write_whole(path.with_name(spec.weights), encode(made.router.weights))
    if len(made.profiles) == 1:
        save_profile(made.profiles[0], path)
        return [path]
    files = [path.with_name(f"{profile.name}{path.suffix}") for profile in made.profiles]
    for profile, file in zip(made.profiles, files, strict=True):
        save_profile(profile, file)
    return files
