"""Preprocessing against transformers' own processor, on photographs and on everything users may hand in."""

from __future__ import annotations

import io
import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from image_families import CLIP, HALF, SKIMAGE, SKLEARN, modes
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from trimvlm.errors import UserError
from trimvlm.image_processing import SingleView
from trimvlm.images import make_preprocessor, read_rgb
from trimvlm.images.single_view import centre_crop, resized

# Inside the installed wheels, so nothing is fetched: colour, grayscale, RGBA, palette, JPEG and PNG.
PHOTOGRAPHS = [
    *(SKIMAGE / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")),
    *(SKIMAGE / name for name in ("camera.png", "coins.png", "logo.png", "no_time_for_that_tiny.gif")),
    *(SKLEARN / name for name in ("china.jpg", "flower.jpg")),
]

SETTINGS = {
    "llava-1.5": SingleView(resize=336, resample=3, crop=(336, 336), rescale=1 / 255, **CLIP),
    "demo": SingleView(resize=112, resample=3, crop=(112, 112), rescale=1 / 255, **HALF),
    "siglip": SingleView(resize=(96, 128), resample=2, crop=None, rescale=1 / 255, **HALF),
    "padded": SingleView(resize=51, resample=1, crop=(70, 85), rescale=1 / 255, **CLIP),
    "crop only": SingleView(resize=None, resample=3, crop=(33, 47), rescale=1 / 255, **CLIP),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    """`AutoImageProcessor` for each of the settings."""
    from transformers import AutoImageProcessor

    def processor(name: str):
        setting = SETTINGS[name]
        directory = tmp_path_factory.mktemp("processor")
        size, crop = setting.resize, setting.crop
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": size is not None,
            "size": {"height": size[0], "width": size[1]}
            if isinstance(size, tuple)
            else {"shortest_edge": size},
            "do_center_crop": crop is not None,
            "crop_size": {"height": crop[0], "width": crop[1]} if crop else {"height": 1, "width": 1},
            "resample": setting.resample,
            "rescale_factor": setting.rescale,
            "image_mean": setting.mean,
            "image_std": setting.std,
        }
        if size is None:
            del config["size"]
        (directory / "preprocessor_config.json").write_text(json.dumps(config))
        return AutoImageProcessor.from_pretrained(directory)

    return {name: processor(name) for name in SETTINGS}


def agree(name: str, theirs, image, theirs_image=None) -> None:
    """Within one of 255 levels; bit for bit where transformers resizes with Pillow too."""
    setting, processor = SETTINGS[name], theirs[name]
    ours = make_preprocessor(setting)(image)
    want = np.asarray(processor(images=image if theirs_image is None else theirs_image)["pixel_values"])
    assert ours.dtype == np.float32 and ours.shape == want.shape
    scale = np.array(setting.std)[:, None, None] / setting.rescale
    assert np.abs((ours - want) * scale).max() <= 1.001
    if processor.backend == "pil":
        np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", SETTINGS)
def test_photographs(name: str, path: Path, theirs):
    agree(name, theirs, path, str(path))
    agree(name, theirs, Image.open(path))


def test_bytes_are_a_file():
    path = SKLEARN / "china.jpg"
    preprocess = make_preprocessor(SETTINGS["demo"])
    np.testing.assert_array_equal(preprocess(path.read_bytes()), preprocess(path))
    np.testing.assert_array_equal(preprocess(str(path)), preprocess(path))


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (901, 2), (112, 112), (113, 112), (111, 337), (47, 33)])
@pytest.mark.parametrize("name", ["demo", "padded", "siglip"])
def test_odd_sizes(name: str, size: tuple[int, int], theirs):
    random = np.random.default_rng(sum(size))
    agree(name, theirs, Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)))


def skip_where_transformers_drops_transparency(mode: str) -> None:
    """transformers 5.20, the last for Python 3.10, drops it; later ones put white behind, and so do we."""
    if mode in {"RGBA", "LA", "P transparent"} and "return_numpy" not in signature(convert_to_rgb).parameters:
        pytest.skip("this transformers drops transparency")


@pytest.mark.parametrize("mode", modes())
def test_modes_as_pillow_images(mode: str, theirs):
    skip_where_transformers_drops_transparency(mode)
    agree("demo", theirs, modes()[mode])


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("L", "png"), ("1", "png"), ("P", "gif"), ("P transparent", "png"), ("RGBA", "png"), ("LA", "png")),
        *(("CMYK", "jpg"), ("CMYK", "tif"), ("I;16", "png"), ("I;16", "tif"), ("F", "tif"), ("RGBA", "webp")),
    ],
)
def test_modes_as_files(mode: str, suffix: str, tmp_path: Path, theirs):
    if mode == "P transparent":  # other transparent files lose it when they are opened
        skip_where_transformers_drops_transparency(mode)
    path = tmp_path / f"picture.{suffix}"
    image = modes()[mode]
    image.save(path, **({"transparency": 7} if "transparent" in mode else {}))
    agree("demo", theirs, path, str(path))


def test_transparency_is_white_in_a_pillow_image_and_dropped_in_a_file(tmp_path: Path):
    """transformers treats the two differently; so do we, on purpose."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    preprocess = make_preprocessor(SETTINGS["demo"])
    assert np.all(preprocess(image) == 1)
    np.testing.assert_array_equal(preprocess(tmp_path / "clear.png")[0, :, 0, 0], [1, -1, -1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_files_upright_but_not_pillow_images(orientation: int, tmp_path: Path, theirs):
    photo = Image.open(SKIMAGE / "rocket.jpg").resize((90, 61))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    photo.save(path, exif=exif)
    agree("siglip", theirs, path, str(path))
    agree("siglip", theirs, Image.open(path))
    assert (read_rgb(path).size == (61, 90)) == (orientation >= 5)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path, theirs):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    path = tmp_path / "two.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    agree("demo", theirs, path, str(path))
    np.testing.assert_array_equal(make_preprocessor(SETTINGS["demo"])(path)[0, :, 0, 0], [1, -1, -1])


def test_resize_truncates_the_long_edge():
    assert resized(480, 640, 336) == (336, 448)
    assert resized(427, 640, 224) == (224, 335)  # 335.7
    assert resized(640, 427, 224) == (335, 224)
    assert resized(5, 5, (3, 7)) == (3, 7)


def test_centre_crop_pads_before_it_cuts():
    ramp = np.arange(1, 4, dtype=np.uint8)[:, None, None].repeat(6, axis=1)
    assert centre_crop(ramp, (6, 6))[:, 0, 0].tolist() == [0, 0, 1, 2, 3, 0]
    assert centre_crop(ramp, (1, 6))[:, 0, 0].tolist() == [2]
    assert centre_crop(ramp, (3, 2)).shape == (3, 2, 1)


def broken(path: Path) -> Path:
    path.write_bytes((SKLEARN / "china.jpg").read_bytes()[:5000])
    return path


@pytest.mark.parametrize("kind", ["missing", "directory", "text", "empty", "cut short"])
def test_unreadable_files_are_named(kind: str, tmp_path: Path):
    path = tmp_path / "holiday.jpg"
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        broken(path)
    with pytest.raises(UserError, match=r"holiday\.jpg: .+; give ") as caught:
        make_preprocessor(SETTINGS["demo"])(path)
    assert "\n" not in str(caught.value)


def test_unreadable_bytes_and_opened_files(tmp_path: Path):
    with pytest.raises(UserError, match="image of 3 bytes"):
        make_preprocessor(SETTINGS["demo"])(b"abc")
    with Image.open(broken(tmp_path / "cut.jpg")) as opened, pytest.raises(UserError, match=r"cut\.jpg"):
        make_preprocessor(SETTINGS["demo"])(opened)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "TGA", "ICO"])
def test_damaged_files_never_end_in_another_exception(kind: str):
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (16, 20, 3), np.uint8)).save(stream, kind)
    whole = np.frombuffer(stream.getvalue(), np.uint8)
    refused = 0
    for _ in range(60):
        damaged = whole[: random.integers(1, len(whole) + 1)].copy()
        damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
        try:
            read_rgb(damaged.tobytes())
        except UserError:
            refused += 1
    assert refused


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(UserError, match="1 x 100000 pixels is too narrow"):
        make_preprocessor(SETTINGS["llava-1.5"])(Image.new("RGB", (1, 100_000)))
