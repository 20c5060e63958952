"""From pixels to visual rows with a backend that one can read: no graph runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimvlm.backends import Port
from trimvlm.encoder import make_encoder
from trimvlm.encoder_rules import EncoderStage
from trimvlm.rules import RandomOrder
from trimvlm.timings import Timings
from trimvlm.vision import make_vision


class Fake:
    """A tower whose row r is the image's first pixel plus r, and a projector that doubles."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def inputs(self, role: str) -> dict[str, Port]:
        assert role == "vision"
        return {"pixel_values": Port(np.dtype(np.float16), (None, 3, 2, 2))}

    def outputs(self, role: str) -> dict[str, Port]:
        half = np.dtype(np.float16)
        return {"tower": Port(half, (None, 10, 1))} if role == "vision" else {"visual": Port(half, (None, 1))}

    def run(self, role: str, feeds: dict[str, Any], fetch: list[str], keep: Any = ()) -> dict[str, Any]:
        (value,) = feeds.values()
        assert value.dtype == np.float16
        self.calls.append((role, value.shape))
        if role == "projector":
            return {"visual": 2 * value}
        return {"tower": (value.ravel()[0] + np.arange(10, dtype=np.float16)).reshape(1, 10, 1)}


def test_the_projector_runs_once_on_the_rows_that_stay() -> None:
    backend: Any = Fake()
    encode = make_encoder(EncoderStage(keep=3, by=RandomOrder(seed=5)), 9)
    see, timings = make_vision(backend, 1, encode, 9), Timings()
    images = [np.full((1, 3, 2, 2), value, np.float32) for value in (100, 200)]
    found = see(images, timings)
    one, two = found.chosen
    assert one.tolist() == two.tolist() and len(one) == 3
    assert found.rows.dtype == np.float16
    assert found.rows.ravel().tolist() == [*(2 * (101 + one)), *(2 * (201 + two))]
    assert backend.calls == [("vision", (1, 3, 2, 2))] * 2 + [("projector", (6, 1))]
    assert timings.select is not None and timings.vision is not None
    assert 0 < timings.select < 1 and 0 < timings.vision < 1


def test_without_images_nothing_runs() -> None:
    backend: Any = Fake()
    encode = make_encoder(EncoderStage(keep=3, by=RandomOrder()), 9)
    see, timings = make_vision(backend, 1, encode, 9), Timings()
    found = see([], timings)
    assert found.rows.shape == (0, 1) and found.chosen == () and found.rows.dtype == np.float16
    assert backend.calls == [] and timings.select is None
