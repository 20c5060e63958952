"""Pixels of every family against transformers' own processors with the published settings."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from image_families import FAMILIES, SKIMAGE, SKLEARN, modes, photo, their_pixels
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from trimvlm.images import fit, make_preprocessor, natural_grid, pixel_shape, pixel_std, to_rgb

PHOTOGRAPHS = [
    *(SKIMAGE / name for name in ("rocket.jpg", "camera.png", "logo.png")),
    SKLEARN / "china.jpg",
]


def agree(family: str, image: Image.Image | Path) -> None:
    """Bit for bit; the image has a grid of its own where the family has grids."""
    processing, _ = FAMILIES[family]
    rgb = to_rgb(image)
    grid = natural_grid(processing, *rgb.size)
    assert grid or family == "mobilevlm"
    ours = make_preprocessor(processing, grid)(image)
    theirs = their_pixels(family, str(image) if isinstance(image, Path) else image)
    assert ours.dtype == np.float32 and ours.shape == pixel_shape(processing, grid) == theirs.shape
    np.testing.assert_array_equal(ours, theirs)
    assert np.ptp(ours * pixel_std(processing)) <= 1.5  # fractions of full brightness, one mean away


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_photographs(family: str, path: Path):
    agree(family, path)


@pytest.mark.parametrize("size", [(1, 1), (31, 57), (336, 336), (1000, 333), (441, 440), (29, 500)])
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_sizes(family: str, size: tuple[int, int]):
    agree(family, photo(*size))


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("family", FAMILIES)
def test_modes(family: str, mode: str):
    if mode in {"RGBA", "LA", "P transparent"} and "return_numpy" not in signature(convert_to_rgb).parameters:
        pytest.skip("transformers 5.20, the last for Python 3.10, drops transparency")
    agree(family, modes()[mode])


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_turned_upright(family: str, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    photo(90, 61).save(path, exif=exif)
    assert to_rgb(path).size == (61, 90)
    agree(family, path)


# A grid that an image of this size comes to; the others are fitted to it.
GRIDS = {
    "llava_next": [(300, 500), (900, 100)],
    "llava_onevision": [(500, 375), (1280, 1000)],
    "internvl": [(400, 400), (448, 1344)],
    "qwen2_vl": [(280, 196), (57, 1001)],
}


@pytest.mark.parametrize("family", GRIDS)
def test_a_fitted_image_is_what_transformers_would_be_given(family: str):
    processing, _ = FAMILIES[family]
    for size in GRIDS[family]:
        grid = natural_grid(processing, *size)
        assert grid
        preprocess = make_preprocessor(processing, grid)
        for image in (photo(400, 77), photo(60, 200), photo(*size)):
            fitted = fit(processing, image, grid)
            assert natural_grid(processing, *fitted.size) == grid
            np.testing.assert_array_equal(preprocess(image), their_pixels(family, fitted))
        assert fitted is image  # the last has the grid already


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl"])
def test_fitting_keeps_the_shape_and_pads_with_black(family: str):
    processing, _ = FAMILIES[family]
    grid = natural_grid(processing, 600, 600)
    assert grid
    image = fit(processing, Image.new("RGB", (500, 100), "white"), grid)
    bright = np.asarray(image).min(axis=2) > 200
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    assert image.width == image.height and len(columns) == image.width
    assert abs(len(rows) - image.height / 5) <= 1
    assert abs(rows[0] - (image.height - 1 - rows[-1])) <= 1
    assert not np.asarray(image)[: rows[0]].any()


def test_the_whole_image_alone_is_what_onevision_sees_of_several():
    """transformers pads to a square there; LLaVA-NeXT has no such case, and sees its overview."""
    processing, processor = FAMILIES["llava_onevision"]
    images = [photo(333, 222), photo(100, 400)]
    theirs = processor()(images=[images])["pixel_values"]
    for image, pixels in zip(images, theirs, strict=True):
        np.testing.assert_array_equal(make_preprocessor(processing)(image), pixels)
    processing, _ = FAMILIES["llava_next"]
    overview = their_pixels("llava_next", images[0])[:1]
    np.testing.assert_array_equal(make_preprocessor(processing)(images[0]), overview)


@pytest.mark.parametrize("family", ["mobilevlm", *GRIDS])
def test_a_thread_of_an_image_does_not_fill_the_memory(family: str):
    processing, _ = FAMILIES[family]
    grid = natural_grid(processing, 300, 500)
    thread = Image.new("RGB", (1, 60_000))
    if grid is None:
        with pytest.raises(Exception, match="1 x 60000 pixels is too narrow"):
            make_preprocessor(processing)(thread)
    else:
        assert make_preprocessor(processing, grid)(thread).shape == pixel_shape(processing, grid)
