"""Reading image files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from kvcomp.core.errors import InputError

FAILURES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(path: Path) -> Image.Image:
    """Return the image in a file, in RGB.

    Raises:
        InputError: the file is not there, or is no image, or is damaged.
    """
    check_image(path)
    try:
        with Image.open(path) as image:  # verify() leaves an image unusable
            return image.convert("RGB")
    except FAILURES as error:
        raise InputError(f"the image file {path} cannot be read: {error}") from None


def check_image(path: Path) -> None:
    """Raise where a file is no image, or one whose damage shows without decoding it.

    Raises:
        InputError: it is.
    """
    try:
        with Image.open(path) as image:
            image.verify()
    except UnidentifiedImageError:
        raise InputError(f"an image file must be one that Pillow can read, and this one is not: {path}") from None
    except FAILURES as error:
        raise InputError(f"the image file {path} cannot be read: {error}") from None
