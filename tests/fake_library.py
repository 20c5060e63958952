"""A library that writes plans of random bytes, for tests of what surrounds a build; and a bundle for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from toy_bundle import write_toy_bundle

from trimvlm import machine
from trimvlm.bundle import Bundle, record, write_manifest
from trimvlm.target import Target
from trimvlm_engines import targets
from trimvlm_engines.library import Work, plan_options
from trimvlm_engines.progress import Progress

VERSION, SYSTEM = "1.7.1.116", "linux-x86_64"


class FakeLibrary:
    """See `trimvlm_engines.library.Library`. Every plan differs; each is a line in the file `log`."""

    writes_plans = True

    def __init__(
        self, target: Target, *, log: Path | None = None, seconds: float = 0.0, version: str = VERSION
    ) -> None:
        self.version = version
        self.options = plan_options(target)
        self.log, self.seconds = log, seconds

    def make(self, work: Work) -> dict[str, Any]:
        assert work.sink is not None
        pieces = 20
        for piece in range(pieces):
            work.sink.write(os.urandom(300))
            time.sleep(self.seconds / pieces)
            work.watch(Progress("Writing at random", piece + 1, pieces, 0))
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{work.graph.name}\n")
        return {"attention": "fused"}


def pretend(patch: pytest.MonkeyPatch, **facts: Any) -> None:
    """Makes this machine one that has the fake library's flavour and the card of `rtx-4090`."""
    known: dict[str, Any] = {
        "library_version": VERSION,
        "system": SYSTEM,
        "compute_capability": "8.9",
        **facts,
    }
    for name, value in known.items():
        patch.setattr(machine, name, lambda *_, value=value: value)


def two_profiles(out: Path) -> Path:
    """The toy bundle with weights (that no graph reads) and a second profile, `other`, with its own graph."""
    write_toy_bundle(out)
    manifest = Bundle(out).manifest
    profile = Bundle(out).profile()
    select = msgspec.structs.replace(profile.decisions.select[0], keep=3)
    decisions = msgspec.structs.replace(profile.decisions, select=(select,))
    other = msgspec.structs.replace(profile, name="other", decisions=decisions)
    (out / "other.profile.json").write_bytes(msgspec.json.encode(other))
    graph = (out / "toy.decoder.fused.onnx").read_bytes()
    (out / "other.decoder.fused.onnx").write_bytes(graph + b"\x32\x01x")  # its doc_string
    (out / "checkpoint").mkdir()
    (out / "checkpoint/model.safetensors").write_bytes(os.urandom(9000))
    new = ("other.profile.json", "other.decoder.fused.onnx", "checkpoint/model.safetensors")
    entry = msgspec.structs.replace(manifest.profiles["toy"], profile=new[0], decoders={"fused": new[1]})
    changed = msgspec.structs.replace(
        manifest,
        weights=(new[2],),
        profiles={**manifest.profiles, "other": entry},
        files={**manifest.files, **{name: record(out / name) for name in new}},
    )
    write_manifest(out, changed)
    return out


def card() -> Target:
    """The target that the fake library builds for."""
    return targets.load("rtx-4090")
