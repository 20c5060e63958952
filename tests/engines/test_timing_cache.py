"""Kernel times of classic TensorRT: kept, merged, and never believed when damaged. Over a fake TensorRT."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from fake_trt import Config

from trimvlm_engines.timing_cache import TimingCache, cache_path

ORIN = "Orin"


def build(path: Path | None, *kernels: str, device: str = ORIN) -> dict[str, float]:
    """One build that times kernels; returns the times that it began with."""
    config = Config(device)
    cache = TimingCache(config, path)
    cache.load()
    times = config.get_timing_cache().times
    known = dict(times)
    times.update(dict.fromkeys(kernels, 2.0))
    cache.save()
    return known


def test_times_are_kept_for_the_next_build(tmp_path: Path) -> None:
    path = tmp_path / "cache/tensorrt.cache"
    assert build(path, "a") == {}
    assert build(path, "b") == {"a": 2.0}
    assert build(path) == {"a": 2.0, "b": 2.0}


def test_builds_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """All of them load before any saves; then they save all at once."""
    path, builds = tmp_path / "tensorrt.cache", 8
    build(path, "first")
    loaded = threading.Barrier(builds)

    def one(number: int) -> None:
        config = Config(ORIN)
        cache = TimingCache(config, path)
        cache.load()
        loaded.wait()
        config.get_timing_cache().times[f"kernel {number}"] = float(number)
        cache.save()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(builds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build(path) == {"first": 2.0, **{f"kernel {number}": float(number) for number in range(builds)}}


@pytest.mark.parametrize("damage", ["cut short", "flipped", "empty"])
def test_damaged_times_are_said_and_replaced(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tensorrt.cache"
    build(path, "a")
    whole = path.read_bytes()
    data = bytearray(whole)
    data[-3] ^= 16
    path.write_bytes({"cut short": whole[:40], "flipped": bytes(data), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert build(path, "b") == {}
    assert f"{path}: damaged; kernels are timed again" in caplog.text
    caplog.clear()
    assert build(path) == {"b": 2.0}
    assert not caplog.records


def test_times_of_another_gpu_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tensorrt.cache"
    build(path, "a")
    with caplog.at_level(logging.WARNING):
        assert build(path, "b", device="Thor") == {}
    assert "kernel times of another GPU" in caplog.text
    assert build(path, device="Thor") == {"b": 2.0}


def test_a_place_that_cannot_be_written_costs_the_times_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path / "file/tensorrt.cache", "a") == {}
    assert "kernel times are not kept" in caplog.text
    assert build(None, "a") == {}


def test_each_version_and_sm_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("10.3.0", "8.7") == tmp_path / "trimvlm/timing/tensorrt-10.3.0-sm8.7.cache"
    assert len({cache_path(version, sm) for version in ("10.3.0", "10.16.1") for sm in ("8.7", "8.9")}) == 4
