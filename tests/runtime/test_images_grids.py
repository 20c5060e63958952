"""Grids against transformers' own functions: which one an image has, and which of several it gets."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_families import (
    FAMILIES,
    INTERNVL,
    MOBILEVLM,
    NEXT,
    NEXT_CANVASES,
    ONEVISION,
    ONEVISION_CANVASES,
    QWEN,
    photo,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from trimvlm.errors import UserError
from trimvlm.image_processing import AnyResolution
from trimvlm.images import fit, make_preprocessor, natural_grid, nearest_grid, pixel_shape, profile_grid
from trimvlm.images.any_resolution import layout, meant

SIDES = st.integers(1, 5000)
WITH_GRIDS = {name: each for name, (each, _) in FAMILIES.items() if name != "mobilevlm"}


def sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Widths and heights of 4 to 4096 pixels, small ones as often as large ones."""
    draw = random.Random(seed)
    return [(int(2 ** draw.uniform(2, 12)), int(2 ** draw.uniform(2, 12))) for _ in range(count)]


@pytest.mark.parametrize("processing", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_layouts_are_transformers(processing: AnyResolution):
    canvases = [list(canvas) for canvas in processing.canvases]
    for width, height in sizes(1500):
        found = layout(processing, width, height)
        rows, columns = get_anyres_image_grid_shape((height, width), canvases, processing.view)
        assert found.tiles == (rows, columns)
        assert rows * columns + 1 == image_size_to_num_patches((height, width), canvases, processing.view)
        canvas = torch.empty(1, rows * processing.tokens, columns * processing.tokens)
        assert tuple(unpad_image(canvas, (height, width)).shape[1:]) == found.covered


def test_onevision_counts_as_many_tokens_as_its_processor():
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.vision_aspect_ratio = "anyres_max_9"
    thinned = 0
    for width, height in sizes(1500, seed=1):
        grid = natural_grid(ONEVISION, width, height)
        if grid is None:
            continue
        best = select_best_resolution((height, width), list(ONEVISION_CANVASES))
        scale = best[0] // 384, best[1] // 384
        counted = processor._get_unpadded_features(height, width, 27, 27, *scale)
        assert counted == (grid[0] * grid[1], grid[0])
        thinned += grid != layout(ONEVISION, width, height).covered
    assert thinned > 20


def test_a_grid_means_one_layout():
    """A square has 1 x 2 tiles where it is small: 24 x 24 tokens in the middle of 24 x 48."""
    assert natural_grid(NEXT, 300, 300) == (24, 24) and layout(NEXT, 300, 300).tiles == (1, 2)
    assert natural_grid(NEXT, 400, 400) == (48, 48)
    assert natural_grid(NEXT, 2000, 1000) == (24, 48)
    # A little wider goes on three tiles, mostly empty at both sides, and comes to the same grid.
    assert layout(NEXT, 2010, 1000).tiles == (1, 3) and layout(NEXT, 2010, 1000).covered == (24, 48)
    assert natural_grid(NEXT, 2010, 1000) is None and profile_grid(NEXT, 2010, 1000) == (24, 48)
    # Thinned out, several canvases come to one grid; it means that with the fewest tiles.
    assert layout(ONEVISION, 4032, 3024).tiles == (5, 6) and natural_grid(ONEVISION, 4032, 3024) is None
    assert profile_grid(ONEVISION, 4032, 3024) == natural_grid(ONEVISION, 1536, 1152) == (70, 93)
    assert pixel_shape(ONEVISION, (70, 93)) == (13, 3, 384, 384)


@pytest.mark.parametrize("processing", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_most_images_have_their_own_grid(processing: AnyResolution):
    drawn = sizes(1500, seed=2)
    usual = [size for size in drawn if max(size) < 3 * min(size)]
    assert sum(natural_grid(processing, *size) is not None for size in usual) > 0.85 * len(usual)
    for width, height in drawn[:300]:
        own, grid = natural_grid(processing, width, height), profile_grid(processing, width, height)
        assert grid == own if own else grid is None or meant(processing, grid)
        assert grid or max(width, height) > 72 * min(width, height)  # no token of LLaVA-NeXT is so narrow


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES)
def test_internvl_tiles_are_transformers(width: int, height: int):
    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
    assert natural_grid(INTERNVL, width, height) == (16 * rows, 16 * columns)
    assert pixel_shape(INTERNVL, (16 * rows, 16 * columns))[0] == rows * columns + (rows * columns > 1)


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES)
def test_qwen_sizes_are_transformers(width: int, height: int):
    if max(width, height) > 200 * min(width, height):
        assert natural_grid(QWEN, width, height) is None
    else:
        rows, columns = smart_resize(height, width, 28, QWEN.least, QWEN.most)
        assert natural_grid(QWEN, width, height) == (rows // 28, columns // 28)


@pytest.mark.parametrize("family", WITH_GRIDS)
@settings(deadline=None, max_examples=60)
@given(width=SIDES, height=SIDES, shape=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_every_image_fits_every_grid(family: str, width: int, height: int, shape: tuple[int, int]):
    processing = WITH_GRIDS[family]
    grid = natural_grid(processing, width, height)
    if grid:
        fitted = fit(processing, photo(*shape), grid)
        assert natural_grid(processing, *fitted.size) == grid


@pytest.mark.parametrize("family", WITH_GRIDS)
def test_the_nearest_grid(family: str):
    processing = WITH_GRIDS[family]
    square, wide, small = (natural_grid(processing, *size) for size in ((670, 670), (1340, 670), (330, 330)))
    assert square and wide and small and square != small
    grids = [small, wide, square]
    assert nearest_grid(processing, grids, 1340, 670) == wide  # its own
    assert nearest_grid(processing, [wide, square], 2790, 1410) == wide
    assert nearest_grid(processing, [wide, square], 100, 900) == square
    assert nearest_grid(processing, grids, 1300, 1300) == square
    assert nearest_grid(processing, [square, small], 200, 199) == small
    assert nearest_grid(processing, [wide], 1, 4000) == wide


@pytest.mark.parametrize(
    ("family", "grid", "message"),
    [
        ("llava_next", (23, 24), "grid 23x24: no image comes to it"),
        ("llava_next", (96, 96), "grid 96x96: no image comes to it"),
        ("llava_onevision", (163, 162), "no image comes to it"),
        ("internvl", (17, 16), "grid 17x16: images here are 1 to 12 tiles of 16x16"),
        ("internvl", (64, 64), "grid 64x64: images here are 1 to 12 tiles"),
        ("qwen2_vl", (1, 2), "grid 1x2: images here are 3136 to 1003520 pixels, 28 x 28 of them a visual"),
        ("qwen2_vl", (1000, 3), "grid 1000x3: images here are"),
        ("qwen2_vl", None, "grid none: images here are"),
        ("mobilevlm", (24, 24), "grid 24x24: every image is one view"),
    ],
)
def test_grids_that_no_image_has(family: str, grid: tuple[int, int] | None, message: str):
    processing, _ = FAMILIES[family]
    for use in (pixel_shape, make_preprocessor):
        with pytest.raises(UserError, match=message):
            use(processing, grid)
    if grid:
        with pytest.raises(UserError, match=message):
            fit(processing, photo(10, 10), grid)


def test_without_grids():
    assert natural_grid(MOBILEVLM, 300, 200) is None and profile_grid(MOBILEVLM, 300, 200) is None
    assert pixel_shape(MOBILEVLM) == (1, 3, 336, 336)
    assert pixel_shape(NEXT) == (1, 3, 336, 336)


def test_a_single_tile_where_a_checkpoint_has_no_more():
    single = msgspec.structs.replace(INTERNVL, most=1)
    assert natural_grid(single, 900, 100) == (16, 16)
    assert pixel_shape(single, (16, 16)) == pixel_shape(INTERNVL) == (1, 3, 448, 448)


def test_the_canvases_of_llava_next_are_all_there():
    assert {natural_grid(NEXT, 3 * width, 3 * height) for height, width in NEXT_CANVASES} == {
        (24 * height // 336, 24 * width // 336) for height, width in NEXT_CANVASES
    }
    assert math.prod(pixel_shape(NEXT, (72, 24))) == 4 * 3 * 336 * 336
