"""A picture file becomes pixels: decode, pad, resize, normalise.

Pixels are uint8 (height, width, 3) in red, green, blue until `normalise` makes them floats. The usual filter
is Pillow's own, because LLaVA was trained on what it gives: it antialiases, and rounds to 8 bits after the
horizontal and after the vertical pass. resample.py has two others.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import numpy.typing as npt

from tinyllava.errors import PictureError
from tinyllava.profile import Colour, Exif, PadPlace, Resample
from tinyllava.vision.resample import bicubic_point, bilinear_point

if TYPE_CHECKING:
    from PIL import Image as PILImage

Pixels = npt.NDArray[np.uint8]  # (h, w, 3)
Source = Union[str, Path, bytes, "PILImage.Image"]

# A megapixel is 3 MB here and 4 MB more in Pillow while it decodes. The largest phone cameras make 200.
MAX_PIXELS = 200_000_000
_pillow_lock = threading.Lock()


class Size(NamedTuple):
    """A size in pixels. Pillow, and LLaVA's pinpoints, say (width, height); everything here says this."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def size_of(rgb: Pixels) -> Size:
    """The size of pixels (h, w, 3)."""
    return Size(int(rgb.shape[0]), int(rgb.shape[1]))


# ---- decode


def read_size(source: Source) -> Size:
    """The picture's size from its header alone, without decoding it. PictureError as for `decode`."""
    where = _name(source)
    with _pillow(where), _opened(source) as image:
        return _header_size(image, where)


def decode(source: Source, exif: Exif = "ignore") -> Pixels:
    """The pixels (h, w, 3) of a file, of a file's bytes, or of a Pillow image.

    The rule is the original's ``Image.open(...).convert("RGB")``: the first frame of several, colours of
    palettes looked up, CMYK converted, the colour under transparent pixels shown as it is stored. A camera's
    EXIF rotation is applied only where ``exif`` is "rotate".

    One departure: Pillow's convert() cuts 16-bit grey off at 255, so that X-rays and depth maps turn white.
    Here their high byte is taken, which is what Pillow itself does with 16-bit colour.

    Raises PictureError when the source is missing, broken, no picture, 32-bit grey, or has more than MAX_PIXELS
    pixels; the last is known from the header, before memory is asked for.
    """
    where = _name(source)
    with _pillow(where), _opened(source) as image:
        _header_size(image, where)
        rgb = _to_rgb(_upright(image) if exif == "rotate" else image, where)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise PictureError(where, f"decodes to an array of shape {rgb.shape}", wanted="(height, width, 3)")
    return rgb


def _name(source: Source) -> str:
    """What messages call the source."""
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    return str(source) if isinstance(source, (str, Path)) else "Pillow image"


@contextmanager
def _pillow(where: str) -> Iterator[None]:
    """Run Pillow so that whatever it raises becomes a PictureError.

    Its decoders raise almost anything on damaged bytes (struct.error, KeyError, ZeroDivisionError, ...), and
    warn of oddities that do not matter here. Its limit on pixels is a global: it is lent ours for the
    moment, since Pillow's own would refuse pictures of the largest phone cameras.
    """
    from PIL import Image, UnidentifiedImageError

    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            yield
        except PictureError:
            raise
        except Image.DecompressionBombError as error:
            raise PictureError(where, f"too large: {str(error).rstrip('.')}", hint=_TOO_LARGE) from None
        except UnidentifiedImageError:
            raise PictureError(where, "not a picture in a format that Pillow opens") from None
        except MemoryError:
            raise PictureError(where, "not enough memory to decode the picture") from None
        except Exception as error:
            raise PictureError(where, f"broken picture ({error or type(error).__name__})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_TOO_LARGE = "Scale the picture down first"


@contextmanager
def _opened(source: Source) -> Iterator[PILImage.Image]:
    """The picture with its header read and its pixels not yet decoded."""
    from PIL import Image

    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, bytes):
        if not source:
            raise PictureError("picture", "no bytes at all")
        yield Image.open(io.BytesIO(source))
    else:
        path = Path(source)
        _check_file(source, path)
        with path.open("rb") as file:
            yield Image.open(file)


def _check_file(source: str | Path, path: Path) -> None:
    """PictureError unless it is a regular file with something in it: opening a pipe would wait for its writer."""
    if str(source).startswith(("http://", "https://")):
        raise PictureError(source, "an address, not a file", hint="Download the picture first")
    if path.is_dir():
        raise PictureError(path, "a directory", wanted="a picture file")
    if not path.is_file():
        found = "not a regular file" if path.exists() else "no such file"
        raise PictureError(path, found, wanted="a picture file")
    if path.stat().st_size == 0:
        raise PictureError(path, "the file is empty", wanted="a picture file")


def _header_size(image: PILImage.Image, where: str) -> Size:
    """The size, if it is safe to decode."""
    size = Size(image.height, image.width)
    if size.height < 1 or size.width < 1:
        raise PictureError(where, f"a picture of {size} pixels", wanted="at least 1x1")
    if size.height * size.width > MAX_PIXELS:
        megapixels = f"{size} is {size.height * size.width / 1e6:.0f} megapixels"
        raise PictureError(where, megapixels, wanted=f"at most {MAX_PIXELS // 1_000_000}", hint=_TOO_LARGE)
    return size


def _upright(image: PILImage.Image) -> PILImage.Image:
    """The picture turned and mirrored as its EXIF mark says, if it has one."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _to_rgb(image: PILImage.Image, where: str) -> Pixels:
    """Pillow's image as pixels (h, w, 3). Modes "I" and "I;16*" are how Pillow holds 16-bit grey.

    PictureError for numbers in mode "I" that need more than 16 bits: nothing says which of them is white.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)  # (h, w)
        if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) <= 0xFFFF:
            found = f"32-bit grey, from {grey.min()} to {grey.max()}"
            raise PictureError(where, found, wanted="0..65535", hint="Convert it to 8 or 16 bits first")
        high_byte = (grey.astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], 3, axis=2)  # (h, w, 3)
    return np.array(image.convert("RGB"))  # (h, w, 3), a copy of its own


# ---- pad, resize, crop


def pad_to(rgb: Pixels, size: Size, colour: Colour, place: PadPlace = "centre") -> Pixels:
    """The picture in a larger one: (h, w, 3) -> (size.height, size.width, 3).

    The centre is rounded down, so an odd pixel of padding is on the right or below.
    """
    height, width = size_of(rgb)
    top, left = (size.height - height) // 2, (size.width - width) // 2
    if place == "top_left":
        top = left = 0
    canvas = np.empty((size.height, size.width, 3), np.uint8)
    canvas[:] = colour
    canvas[top : top + height, left : left + width] = rgb
    return canvas


def pad_to_square(rgb: Pixels, colour: Colour, place: PadPlace = "centre") -> Pixels:
    """(h, w, 3) -> (s, s, 3) with s = max(h, w)."""
    side = max(size_of(rgb))
    return pad_to(rgb, Size(side, side), colour, place)


def resize(rgb: Pixels, size: Size, resample: Resample = "bicubic") -> Pixels:
    """(h, w, 3) -> (size.height, size.width, 3). The same size is a copy, bit for bit."""
    return RESAMPLERS[resample](rgb, size.height, size.width)


def bicubic(rgb: Pixels, height: int, width: int) -> Pixels:
    """Pillow's bicubic filter: (h, w, 3) -> (height, width, 3), first along the rows, then along the columns.

    Pillow up to 12 always takes that order. Pillow 13 turns it round for pictures that shrink much more in
    height than in width, which changes a few bytes by up to 3, since each pass rounds. Asking for the two
    passes one by one gives the same pixels with every Pillow: those that LLaVA was trained on.
    """
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    rows = Image.fromarray(rgb).resize((width, rgb.shape[0]), bicubic)
    return np.array(rows.resize((width, height), bicubic))


RESAMPLERS: dict[Resample, Callable[[Pixels, int, int], Pixels]] = {
    "bicubic": bicubic,
    "bilinear_point": bilinear_point,
    "bicubic_point": bicubic_point,
}


def crop_centre(rgb: Pixels, size: Size) -> Pixels:
    """The middle of a picture: (h, w, 3) -> (size.height, size.width, 3), its place rounded down."""
    height, width = size_of(rgb)
    top, left = (height - size.height) // 2, (width - size.width) // 2
    return rgb[top : top + size.height, left : left + size.width]


# ---- normalise


def normalise(rgb: Pixels, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """(h, w, 3) in 0..255 -> (3, h, w): (value / 255 - mean) / std for each colour.

    Equal to the last bit to CLIPImageProcessor (transformers 4.37), which also rounds to float32 after each
    step. It multiplies by 1/255 in float64 instead: the same 256 values.
    """
    scaled = rgb.astype(np.float32) / np.float32(255)
    normal = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))  # (3, h, w)


def mean_colour(mean: Sequence[float]) -> Colour:
    """The colour that normalises to about zero: int(255 * mean), e.g. (122, 116, 104) for CLIP."""
    red, green, blue = (int(m * 255) for m in mean)
    return red, green, blue
