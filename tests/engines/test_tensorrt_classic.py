"""Classic TensorRT where it is not installed, and what of its builder needs no device.

Its plans are not built here: they need the device. What it shares with TensorRT-RTX is tested there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimvlm import machine
from trimvlm.errors import UserError
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_engines.tensorrt_classic import TensorRt, _timing_cache

ORIN = "jetson-orin-nano-8gb"


def test_not_installed(
    bundle: Path, contents: Callable[[], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = contents()
    with pytest.raises(
        UserError, match=f"target {ORIN}: tensorrt is not installed, .* comes with JetPack .* index"
    ) as caught:
        build(bundle, ORIN, "dense")
    assert "\n" not in str(caught.value)
    assert contents() == before


@pytest.mark.parametrize(
    ("version", "found", "message"),
    [
        ("10.16.1.11", "8.7", r"tensorrt 10.16.1.11 is installed, but it takes >=10.3,<10.4"),
        (
            "10.3.0.30",
            None,
            r"built on the device \(SM 8.7\), but this machine has no GPU; copy the bundle there",
        ),
        ("10.3.0.30", "8.9", r"built on the device \(SM 8.7\), but this machine has a GPU of SM 8.9"),
    ],
)
def test_wrong_version_or_device(
    monkeypatch: pytest.MonkeyPatch, version: str, found: str | None, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    monkeypatch.setattr(machine, "compute_capability", lambda: found)
    with pytest.raises(UserError, match=message):
        TensorRt(targets.load(ORIN))


def test_machine_without_a_driver_has_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert machine.compute_capability() is None


class Config:
    """Of TensorRT's IBuilderConfig, what the timing cache needs."""

    def __init__(self, accepts: Callable[[bytes], bool]) -> None:
        self.accepts = accepts
        self.cache = b"unset"

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch  # times of another GPU are worthless
        if self.accepts(cache):
            self.cache = cache
        return self.accepts(cache)

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: bytearray(self.cache + b"+new"))


def test_timing_cache_is_kept_between_builds(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for expected in (b"+new", b"+new+new"):
        _timing_cache(Config(lambda data: True), path)()
        assert path.read_bytes() == expected


def test_timing_cache_of_another_gpu_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"other")
    config = Config(lambda data: data == b"")
    save = _timing_cache(config, path)
    assert config.cache == b""
    save()
    assert path.read_bytes() == b"+new"
