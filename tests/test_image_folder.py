"""Folders of images become classes: which, in what order, and what is refused."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from metaopt.datasets import DataError, load_image_folder
from metaopt.few_shot import Episodes


def drawing(seed: int, shape: tuple[int, ...] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def put(root: Path, path: str, pixels: np.ndarray, **options) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


@pytest.fixture
def root(tmp_path):
    """Two alphabets with three characters, drawn three, one and two times."""
    for seed, path in enumerate(
        (
            "Latin/b/1.png",
            "Greek/a/2.png",
            "Greek/a/10.PNG",
            "Greek/a/1.bmp",
            "Latin/a/1.png",
        )
    ):
        put(tmp_path, path, drawing(seed))
    put(tmp_path, "Latin/b/0.pgm", drawing(5))
    put(tmp_path, ".cache/a/1.png", drawing(6))
    put(tmp_path, "Latin/.hidden.png", drawing(7))
    (tmp_path / "README.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_each_folder_with_images_is_a_class(root):
    data = load_image_folder(root)
    assert data.name == root.name
    assert data.x.shape == (3, 3, 6, 8) and data.x.dtype == np.uint8
    np.testing.assert_array_equal(data.counts, [3, 1, 2])
    # Greek/a: 1.bmp, 10.PNG, 2.png; Latin/a: 1.png; Latin/b: 0.pgm, 1.png.
    for place, seed in (((0, 0), 3), ((0, 1), 2), ((0, 2), 1), ((1, 0), 4), ((2, 0), 5)):
        np.testing.assert_array_equal(data.x[place], drawing(seed))
    np.testing.assert_array_equal(data.x[2, 1], drawing(0))


def test_tasks_are_drawn_from_them(root):
    data = load_image_folder(str(root), name="letters")
    with pytest.raises(ValueError, match="class 1 of letters has 1 examples"):
        Episodes(data, 2, 1, 1)
    episodes = Episodes(data[data.counts >= 2], 2, 1, 1)
    task = episodes.draw(jax.random.key(0))
    assert task.support[0].shape == (2, 6, 8)
    assert float(task.query[0].max()) <= 1


def test_colours_come_first(tmp_path):
    pixels = drawing(0, (6, 8, 3))
    put(tmp_path, "a/1.png", pixels)
    put(tmp_path, "a/2.png", pixels[..., 0])
    x = load_image_folder(tmp_path, mode="RGB").x
    assert x.shape == (1, 2, 3, 6, 8)
    np.testing.assert_array_equal(x[0, 0], np.moveaxis(pixels, -1, 0))
    np.testing.assert_array_equal(x[0, 1], np.stack(3 * [pixels[..., 0]]))
    grey = load_image_folder(tmp_path).x[0, 0]
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey, luma, atol=1)


def test_sizes_must_be_one_or_be_given(root):
    odd = put(root, "Latin/c/1.png", np.full((12, 4), 9, np.uint8))
    with pytest.raises(DataError, match=r"c/1\.png has 12 x 4 pixels.*1\.bmp 6 x 8.*size="):
        load_image_folder(root)
    assert load_image_folder(root, size=5).x.shape == (4, 3, 5, 5)
    data = load_image_folder(root, size=(3, 7))
    assert data.x.shape == (4, 3, 3, 7)
    np.testing.assert_array_equal(data.x[3, 0], 9)
    assert odd.exists()


def test_the_transparent_is_white(tmp_path):
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[0, :, 3] = 255  # black in the first row, and transparent black below it
    put(tmp_path, "a/1.png", ink)
    palette = Image.fromarray(np.eye(4, dtype=np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "a/2.png", transparency=0)
    x = load_image_folder(tmp_path).x[0]
    np.testing.assert_array_equal(x[0], np.where(ink[..., 3] > 0, 0, 255))
    np.testing.assert_array_equal(x[1] == 255, np.eye(4) == 0)


def test_images_are_turned_as_the_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    put(tmp_path, "a/1.png", drawing(0), exif=exif)
    x = load_image_folder(tmp_path).x[0, 0]
    np.testing.assert_array_equal(x, np.rot90(drawing(0), -1))


def test_what_is_no_sound_image_is_named(root):
    file = root / "Greek/a/2.png"
    sound = file.read_bytes()
    for content in (b"", b"<html>not found</html>", sound[: len(sound) // 2], sound[:-30]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a/2\.png is no sound image"):
            load_image_folder(root)
    put(root, "Greek/a/2.png", np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000)
    with pytest.raises(DataError, match=r"a/2\.png has pixels of more than eight bits"):
        load_image_folder(root)
    # It says that it is a PNG, and is something else.
    Image.fromarray(drawing(0)).save(file, "GIF")
    with pytest.raises(DataError, match=r"a/2\.png is no sound image"):
        load_image_folder(root)


def test_a_huge_image_is_refused_before_it_is_unpacked(tmp_path):
    put(tmp_path, "a/1.png", np.zeros((8200, 8200), np.uint8))
    with pytest.raises(DataError, match="8200 x 8200 pixels, more than"):
        load_image_folder(tmp_path)


def test_folders_that_do_not_fit(root, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"empty has no folder with images"):
        load_image_folder(root / "empty")
    with pytest.raises(DataError, match=r"is in no folder of a class: expected"):
        load_image_folder(root / "Latin/a")


@pytest.mark.parametrize("size", [0, -3, (3,), (3, 0), "28", 2.5])
def test_bad_sizes(root, size):
    with pytest.raises(ValueError, match="`size`"):
        load_image_folder(root, size=size)


def test_bad_mode(root):
    with pytest.raises(ValueError, match="`mode` must be 'L' or 'RGB'"):
        load_image_folder(root, mode="grey")  # pyright: ignore[reportArgumentType]


def test_without_pillow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"metaopt-jax\[plot\]"):
        load_image_folder(root)
