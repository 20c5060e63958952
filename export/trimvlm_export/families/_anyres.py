"""Where the tokens of an image lie on its tiles, and in which order the decoder reads them (LLaVA-NeXT and
-OneVision). Which tiles a grid means is `trimvlm.images.any_resolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimvlm.errors import UserError
from trimvlm.image_processing import AnyResolution
from trimvlm.images import any_resolution
from trimvlm.profile import Grid


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tokens of one image lie.

    Attributes:
        side: tokens at each side of a view, n.
        tiles: rows and columns of views beside that of the whole image; (0, 0): that one alone.
        covered: rows and columns of the tiles' tokens that the image covers.
        grid: rows and columns of tokens after thinning out; where nothing is, as `covered`.
    """

    side: int
    tiles: Grid = (0, 0)
    covered: Grid = (0, 0)
    grid: Grid = (0, 0)

    @property
    def views(self) -> int:
        """How many the tower sees, that of the whole image first."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def thinned(self) -> bool:
        """Whether tokens are interpolated."""
        return self.grid != self.covered

    @property
    def visual_tokens(self) -> int:
        """What the decoder reads: the whole image, then each row of the grid and a newline; the whole image
        alone has one newline, too."""
        rows, columns = self.grid
        return self.side**2 + (rows * (columns + 1) or 1)

    def covered_rows(self) -> NDArray[np.int64]:
        """The covered tokens, row by row, [h * w], as numbers of rows of all views (views * n * n)."""
        (rows, columns), (height, width), n = self.tiles, self.covered, self.side
        tiles = np.arange(n * n, self.views * n * n).reshape(rows, columns, n, n)
        canvas = tiles.swapaxes(1, 2).reshape(rows * n, columns * n)
        top, left = (rows * n - height) // 2, (columns * n - width) // 2
        return canvas[top : top + height, left : left + width].ravel()

    def order(self) -> NDArray[np.int64]:
        """The decoder's order, [visual_tokens], as numbers of rows: first of all views, or where tokens are
        thinned out of the whole image and then the grid; last the newline."""
        whole, (rows, columns) = np.arange(self.side**2), self.grid
        if not rows:
            return np.append(whole, len(whole))
        size = len(whole) + rows * columns if self.thinned else self.views * len(whole)
        grid = np.arange(len(whole), size) if self.thinned else self.covered_rows()
        lines = np.pad(grid.reshape(rows, columns), ((0, 0), (0, 1)), constant_values=size)
        return np.concatenate([whole, lines.ravel()])


def layout(
    grid: Grid, *, canvases: Sequence[Sequence[int]], view: int, side: int, most: int | None
) -> Layout:
    """The layout that a grid means.

    Args:
        canvases: (height, width) in pixels, multiples of `view`.
        view: pixels at each side of a view.
        side: tokens at each side of a view.
        most: how many views' worth of tokens the grid may have before it is thinned out, or None.

    Raises:
        UserError: no image comes to this grid, or a canvas is no whole views.
    """
    for height, width in canvases:
        if height % view or width % view or not (height and width):
            raise UserError(
                f"image_grid_pinpoints: {height}x{width} pixels are no whole views of {view}x{view}; correct "
                "config.json"
            )
    geometry = AnyResolution(
        view=view,
        tokens=side,
        canvases=tuple((height, width) for height, width in canvases),
        most=most,
        # What becomes of colours is the image processor's, and nothing that the grid depends on.
        **{"square": False, "resample": 0, "rescale": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3},
    )
    found = any_resolution.meant(geometry, grid)
    if found is None:
        sizes = ((width, height) for height, width in geometry.canvases)
        whole = {any_resolution.natural_grid(geometry, *size) for size in sizes}
        raise UserError(
            f"grid: no image comes to {grid[0]}x{grid[1]} visual tokens in this model; whole tiles come to "
            + ", ".join(f"{rows}x{columns}" for rows, columns in sorted(filter(None, whole)))
        )
    return Layout(side=side, tiles=found.tiles, covered=found.covered, grid=grid)
