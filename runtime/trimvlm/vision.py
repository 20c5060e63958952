"""From pixels to the visual rows of the decoder: the vision graph, or tower, encoder stage and projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Backend
from trimvlm.encoder import Encode
from trimvlm.timings import Timings


@dataclass(frozen=True, kw_only=True)
class VisualRows:
    """What images become.

    Attributes:
        rows: [m * K, D] for m images, image by image.
        chosen: for each image the patches that its rows stem from, int64, in the order of the rows (see
            `make_encoder`), counted through all views; empty where the profile has no encoder stage.
    """

    rows: NDArray[np.floating]
    chosen: tuple[NDArray[np.int64], ...] = ()


See: TypeAlias = Callable[[Sequence[NDArray[np.float32]], Timings], VisualRows]


def make_vision(backend: Backend, width: int, encode: Encode | None, patches: int) -> See:
    """Resolves a profile's way from pixels to visual rows into a function.

    Args:
        backend: is open when the function is called.
        width: of the decoder, D.
        encode: the encoder stage for one view, see `make_encoder`; None: the profile has none.
        patches: of one view.

    Returns:
        `see(pixels, timings)`: pixels of each image, as `make_preprocessor` gives them; sets `vision` and
        `select`.
    """

    def see(images: Sequence[NDArray[np.float32]], timings: Timings) -> VisualRows:
        start = perf_counter()
        port = backend.outputs("projector" if encode else "vision")["visual"]
        if encode is None or not images:
            rows = [_run(backend, pixels, ["visual"])[0].reshape(-1, width) for pixels in images]
            visual = VisualRows(rows=_join(rows, width, port.dtype))
        else:
            names = list(backend.outputs("vision"))
            taken: list[NDArray[np.floating]] = []
            chosen: list[NDArray[np.int64]] = []
            timings.select = 0.0
            for pixels in images:
                found = _run(backend, pixels, names)
                before = perf_counter()
                views = [encode(dict(zip(names, each, strict=True))) for each in zip(*found, strict=True)]
                timings.select += perf_counter() - before
                taken += [rows_KE for rows_KE, _ in views]
                chosen.append(np.concatenate([n * patches + each for n, (_, each) in enumerate(views)]))
            projected = backend.run("projector", {"features": np.concatenate(taken)}, ["visual"])["visual"]
            visual = VisualRows(rows=projected, chosen=tuple(chosen))
        timings.vision = perf_counter() - start - (timings.select or 0.0)
        return visual

    return see


def _run(backend: Backend, pixels: NDArray[np.float32], names: list[str]) -> list[NDArray[np.floating]]:
    """Outputs of the vision graph for one image."""
    ((name, port),) = backend.inputs("vision").items()
    found = backend.run("vision", {name: pixels.astype(port.dtype, copy=False)}, names)
    return [found[name] for name in names]


def _join(rows: list[NDArray[np.floating]], width: int, dtype: np.dtype) -> NDArray[np.floating]:
    if len(rows) == 1:
        return rows[0]
    return np.concatenate(rows) if rows else np.zeros((0, width), dtype)
