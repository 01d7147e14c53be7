"""Images in folders, one folder for each class."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from .._core._files import DataError, pillow
from .._core._validate import check_count
from ._class_data import ClassData


_FORMATS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF"},
    **{".pgm": "PPM", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"},
}
# The other modes of Pillow have more than eight bits in a pixel, which it would cut off.
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_WITH_ALPHA = {"LA", "PA", "RGBA"}
_MAX_PIXELS = 2**26


def load_image_folder(
    root: str | os.PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    mode: Literal["L", "RGB"] = "L",
    name: str | None = None,
) -> ClassData:
    """Images in folders, one folder for each class, for few-shot tasks.

    Every folder under `root`, at any depth, that has images in it is a class:
    `root/Greek/alpha/01.png` is an example of the class `Greek/alpha`. Classes are in the
    order of their paths, and so are the examples of each. Names that begin with a dot, and
    files that do not end like images, are left alone. Needs Pillow, which comes with
    `metaopt-jax[plot]`.

    Images are turned as their camera noted, and what is transparent becomes white.

    **Arguments:**

    - `root`: the folder.
    - `size`: the height and width in pixels that images are resized to, or one number
        for both; `None` where all have one size.
    - `mode`: `"L"` for grey, `"RGB"` for colour.
    - `name`: what the data are called in tables and pictures; by default like the folder.

    **Returns:**

    A [`metaopt.datasets.ClassData`][] with `x` uint8 of shape `(num_classes, most, height,
    width)`, for colour `(num_classes, most, 3, height, width)`.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file that is missing, damaged, or of another
    size than those before it.
    """
    if mode not in ("L", "RGB"):
        raise ValueError(f"`mode` must be 'L' or 'RGB'; got {mode!r}.")
    if size is not None:
        size = (size, size) if isinstance(size, int) else size
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise ValueError(f"`size` must be a height and a width; got {size!r}.")
        for number in size:
            check_count(number, "size")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in _FORMATS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )
    loose = [path for path in files if path.parent == root]
    if loose:
        raise DataError(
            f"{loose[0]} is in no folder of a class: expected {root}/CLASS/{loose[0].name}."
        )
    if not files:
        raise DataError(f"{root} has no folder with images ({', '.join(_FORMATS)}) in it.")
    classes = sorted({path.parent for path in files})
    numbers = {folder: number for number, folder in enumerate(classes)}
    images = []
    for path in files:
        image = _read(path, size, mode)
        if images and image.shape != images[0].shape:
            expected, got = (" x ".join(map(str, a.shape[-2:])) for a in (images[0], image))
            raise DataError(
                f"{path} has {got} pixels, and {files[0]} {expected}. Give the size that "
                "all of them are resized to: `size=...`."
            )
        images.append(image)
    labels = np.array([numbers[path.parent] for path in files])
    return ClassData.from_labels(np.stack(images), labels, name or root.resolve().name)


def _read(path: Path, size: tuple[int, int] | None, mode: str) -> np.ndarray:
    """One image, of shape `(*channels, height, width)`."""
    Image, ImageOps = pillow("Image"), pillow("ImageOps")
    try:
        with Image.open(path, formats=(_FORMATS[path.suffix.lower()],)) as image:
            # Before memory is taken for it: little can unpack to very much.
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, more than "
                    f"{_MAX_PIXELS:,}."
                )
            if image.mode not in _EIGHT_BITS:
                raise DataError(
                    f"{path} has pixels of more than eight bits (mode {image.mode!r} of "
                    "Pillow), which would be cut off. Convert it to eight bits before."
                )
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info or image.mode in _WITH_ALPHA:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            image = image.convert(mode)
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no sound image: {error}.") from error
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array if mode == "L" else np.moveaxis(array, -1, 0)
