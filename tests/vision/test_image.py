"""Pictures of every kind that Pillow opens, and everything that is not one."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from golden.pictures import picture
from tinyllava.errors import MAX_LENGTH, PictureError
from tinyllava.vision import image
from tinyllava.vision.image import (
    Size,
    crop_centre,
    decode,
    mean_colour,
    normalise,
    pad_to,
    pad_to_square,
    read_size,
    resize,
)

RGB = picture(20, 12)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# ---- what opens


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_files_give_their_pixels(kind: str) -> None:
    data = encoded(Image.fromarray(RGB), kind)
    assert np.array_equal(decode(data), RGB)
    assert read_size(data) == Size(12, 20)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_files_give_what_pillow_gives(kind: str) -> None:
    data = encoded(Image.fromarray(RGB), kind)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_path_a_string_bytes_and_a_pillow_image_are_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a b é.png"
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    sources = [path, str(path), path.read_bytes(), Image.fromarray(RGB)]
    assert all(np.array_equal(decode(source), RGB) for source in sources)
    assert [read_size(source) for source in sources] == [Size(12, 20)] * 4


def test_the_pixels_are_writable_and_own_their_memory() -> None:
    source = Image.fromarray(RGB)
    decode(source)[:] = 0
    assert np.array_equal(np.asarray(source), RGB)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decode(data), np.full((4, 4, 3), (255, 0, 0)))


def test_a_palette_is_looked_up() -> None:
    source = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    source.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(source, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_transparency_of_a_palette_warns_nobody() -> None:
    source = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    source.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(source, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data)[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_alpha_is_dropped_and_the_colour_below_it_shows() -> None:
    source = Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], np.uint8))
    assert decode(encoded(source, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "F"])
def test_other_modes_convert_as_pillow_does(mode: str) -> None:
    grey = Image.fromarray(RGB).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    assert np.array_equal(decode(grey), np.asarray(grey.convert("RGB")))


def test_cmyk_jpeg() -> None:
    data = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = np.array([[0, 255, 256, 4660], [32767, 32768, 65280, 65535]], np.uint16)
    green = decode(encoded(Image.fromarray(values), kind))[:, :, 1]
    assert green.tolist() == [[0, 0, 1, 18], [127, 128, 255, 255]]


def test_16_bit_grey_in_pillows_32_bit_mode() -> None:
    data = b"P5 2 1 65535\n" + np.array([0x1234, 0xFFFF], ">u2").tobytes()
    assert Image.open(io.BytesIO(data)).mode == "I"
    assert decode(data)[0, :, 0].tolist() == [0x12, 0xFF]


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encoded(Image.fromarray(RGB), "JPEG", exif=exif)).shape == (12, 20, 3)


# ---- what does not


@pytest.mark.parametrize("values", [[0, 1 << 20], [-5, 255], [0, 65536]])
def test_32_bit_grey_is_not_guessed_at(values: list[int]) -> None:
    with pytest.raises(PictureError, match=f"^Pillow image: 32-bit grey, from {values[0]} to {values[1]}; wanted"):
        decode(Image.fromarray(np.array([values], np.int32)))


def message(source: Any) -> str:
    with pytest.raises(PictureError) as caught:
        decode(source)
    text = str(caught.value)
    assert "\n" not in text and len(text) <= MAX_LENGTH
    with pytest.raises(PictureError):
        read_size(source)
    return text


def test_missing_directory_empty_pipe_and_address(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "none.png")
    assert "directory" in message(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "empty" in message(tmp_path / "empty.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in message(tmp_path / "pipe")
    assert "Download" in message("https://example.com/cat.jpg")
    assert message(b"") == "picture: no bytes at all"
    assert message("a\0b.png")
    assert message("x" * 5000)
    assert message("line\nbreak.png")


def test_a_large_file_that_is_no_picture_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1 << 36)  # 64 GiB of nothing, sparse
    assert "not a picture" in message(path)


def test_text_and_models_are_not_pictures(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary\n" * 10)
    assert message(path) == f"{path}: not a picture in a format that Pillow opens"
    assert "not a picture" in message(b"GGUF\x03\x00\x00\x00" + bytes(100))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_broken(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture(200, 100)), kind)
    path = tmp_path / "half"
    for n in (10, len(data) // 2):
        path.write_bytes(data[:n])
        for source in (data[:n], path):
            with pytest.raises(PictureError):
                decode(source)


def test_a_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_to_rgb", lambda *_: pytest.fail("decoded a bomb"))
    assert "20000x10001 is 200 megapixels; wanted at most 200" in message(png_header(20000, 10001))
    assert "too large" in message(png_header(60000, 60000)) and ".." not in message(png_header(60000, 60000))
    assert message(png_header(2**31 - 1, 2**31 - 1))


def test_a_200_megapixel_phone_picture_is_no_bomb() -> None:
    assert read_size(png_header(16320, 12240)) == Size(12240, 16320)


def test_pillows_own_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    decode(Image.fromarray(RGB))
    message(b"broken")
    assert before == Image.MAX_IMAGE_PIXELS


SAMPLES = [
    encoded(Image.fromarray(RGB), "PNG"),
    encoded(Image.fromarray(RGB), "JPEG"),
    encoded(Image.fromarray(RGB), "GIF"),
    encoded(Image.fromarray(RGB), "WEBP"),
    encoded(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"),
    encoded(Image.fromarray(RGB), "BMP"),
    encoded(Image.fromarray(RGB), "ICO"),
    encoded(Image.fromarray(RGB), "JPEG2000"),
]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_give_a_picture_or_a_picture_error(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        rgb = decode(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
    except PictureError as error:
        assert "\n" not in str(error)
    else:
        assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8


# ---- pad, resize, crop, normalise


def test_padding_by_hand() -> None:
    row = np.full((1, 4, 3), 9, np.uint8)
    padded = pad_to_square(row, (1, 2, 3))
    assert padded.shape == (4, 4, 3)
    # (4 - 1) // 2 = 1 row above, so 2 below.
    assert padded[:, 0].tolist() == [[1, 2, 3], [9, 9, 9], [1, 2, 3], [1, 2, 3]]
    column = pad_to_square(row.transpose(1, 0, 2), (1, 2, 3))
    assert column[0].tolist() == [[1, 2, 3], [9, 9, 9], [1, 2, 3], [1, 2, 3]]


def test_a_square_needs_no_padding() -> None:
    assert np.array_equal(pad_to_square(RGB[:, :12], (0, 0, 0)), RGB[:, :12])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_padding_keeps_the_picture(height: int, width: int, more_rows: int, more_columns: int) -> None:
    rgb = picture(width, height)
    padded = pad_to(rgb, Size(height + more_rows, width + more_columns), (7, 8, 9))
    top, left = more_rows // 2, more_columns // 2
    assert np.array_equal(padded[top : top + height, left : left + width], rgb)
    padded[top : top + height, left : left + width] = (7, 8, 9)
    assert (padded == (7, 8, 9)).all()


def test_resize_is_pillows_bicubic() -> None:
    want = Image.fromarray(RGB).resize((7, 31), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(RGB, Size(31, 7)), np.asarray(want))
    assert np.array_equal(resize(RGB, Size(12, 20)), RGB)


def test_crop_takes_the_middle() -> None:
    assert np.array_equal(crop_centre(RGB, Size(12, 5)), RGB[:, 7:12])


def test_normalise_by_hand() -> None:
    rgb = np.array([[[0, 51, 255]]], np.uint8)
    normal = normalise(rgb, (0.5, 0.2, 0.25), (0.5, 0.1, 0.25))
    assert normal.shape == (3, 1, 1) and normal.dtype == np.float32
    np.testing.assert_allclose(normal.ravel(), [-1.0, 0.0, 3.0], atol=1e-6)


def test_the_mean_colour_of_clip() -> None:
    assert mean_colour((0.48145466, 0.4578275, 0.40821073)) == (122, 116, 104)


def test_all_256_values_are_scaled_as_the_original_scales_them() -> None:
    rgb = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    want = (rgb * (1 / 255)).astype(np.float32)  # transformers/image_transforms.py: float64, then rounded
    assert np.array_equal(normalise(rgb, (0, 0, 0), (1, 1, 1)), want.transpose(2, 0, 1))
