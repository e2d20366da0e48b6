"""Pixels as people see them, whatever else their files hold."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from pid_lightning.pictures.pixels import UnusablePicture, read_pixels, read_size

LEVELS = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
PICTURE = Image.fromarray(LEVELS)


def seen(file: Path | bytes) -> np.ndarray:
    content = io.BytesIO(file) if isinstance(file, bytes) else file
    return read_pixels(content).permute(1, 2, 0).numpy()


def encoded(picture: Image.Image, name: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_no_exif_hides_intact_pixels(name):
    """Random and damaged EXIF blocks: the pixels are those of the file without, perhaps turned."""
    draw = random.Random(name)
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}}[name]
    plain = seen(encoded(PICTURE, name, **options))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 1, "a camera", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    whole = exif.tobytes()
    for _ in range(60):
        block = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            block[draw.randrange(6, len(block))] = draw.randrange(256)
        if draw.random() < 0.2:
            block = block[: draw.randrange(6, len(block))]
        if name == "TIFF":
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[34665], tags[282] = draw.randrange(2**16), draw.random()
            tags[315] = bytes(block).decode("latin-1")
            file = encoded(PICTURE, name, tiffinfo=tags)
        else:
            file = encoded(PICTURE, name, exif=bytes(block), **options)
        found = seen(file)
        assert found.size == plain.size
        assert np.array_equal(np.sort(found, axis=None), np.sort(plain, axis=None))


def test_the_orientation_of_a_tiff_is_applied_once():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = 6
    turned = encoded(PICTURE, "TIFF", tiffinfo=tags)
    assert np.array_equal(seen(turned), np.rot90(LEVELS, -1))


def test_long_texts_are_passed_over():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "x" * 3_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    file = encoded(PICTURE, "PNG", pnginfo=texts, exif=exif)
    assert np.array_equal(seen(file), LEVELS[::-1, ::-1])


def wide_profile() -> bytes:
    """A profile of sRGB's curve with red and blue exchanged, which shows where it is applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * 20, 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    red_at = struct.unpack(">I", profile[red + 4 : red + 8])[0]
    blue_at = struct.unpack(">I", profile[blue + 4 : blue + 8])[0]
    r, b = profile[red_at : red_at + 20], profile[blue_at : blue_at + 20]
    profile[red_at : red_at + 20], profile[blue_at : blue_at + 20] = b, r
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_are_converted_to_srgb(mode):
    picture = PICTURE.convert(mode)
    file = encoded(picture, "PNG", icc_profile=wide_profile())
    expected = np.asarray(picture.convert("RGB"))[..., ::-1]
    assert np.abs(seen(file).astype(int) - expected).max() <= 3


def test_srgb_and_what_is_no_profile_leave_the_numbers():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all", wide_profile()[:200]):
        assert np.array_equal(seen(encoded(PICTURE, "PNG", icc_profile=profile)), LEVELS)
    grey = PICTURE.convert("L")
    file = encoded(grey, "PNG", icc_profile=wide_profile())  # of three channels
    assert np.array_equal(seen(file)[..., 0], np.asarray(grey))


def tiff(pixels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF."""
    height, width = pixels.shape
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(content)),
        (339, 3, sample_format),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(content))
    return head + content + struct.pack("<H", len(entries)) + directory + struct.pack("<I", 0)


def test_greys_of_other_ranges_are_scaled_or_refused():
    greys = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    for deep, bits in (
        (greys.astype(np.uint16) * 257, 16),
        (greys.astype(np.uint32) * 0x1010101, 32),
    ):
        assert np.array_equal(seen(tiff(deep, bits))[..., 0], greys)
    inverted = tiff(65535 - greys.astype(np.uint16) * 257, 16, photometric=0)
    assert np.array_equal(seen(inverted)[..., 1], greys)
    for signed, bits in ((np.int16, 16), (np.int32, 32)):
        with pytest.raises(UnusablePicture):
            seen(tiff(greys.astype(signed), bits, sample_format=2))
    with pytest.raises(UnusablePicture):
        seen(tiff(greys.astype(np.float32), 32, sample_format=3))


def test_only_pictures_of_the_list_are_opened_whatever_their_name(tmp_path, monkeypatch):
    """PostScript would start a program, with Pillow as it comes."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    script = tmp_path / "a.png"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "b.jpg").write_bytes(encoded(PICTURE, "PPM"))
    for name in ("a.png", "b.jpg"):
        for read in (read_pixels, read_size):
            with pytest.raises(UnusablePicture):
                read(tmp_path / name)
    assert not started


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # which would wait for ever
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "missing.png"):
        with pytest.raises(UnusablePicture):
            read_pixels(tmp_path / name)
    with pytest.raises(UnusablePicture):
        read_pixels("/dev/zero")


def test_first_frames_and_other_suffixes_are_read(tmp_path):
    frames = [PICTURE.quantize(256), Image.new("P", PICTURE.size)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(seen(tmp_path / "a.gif"), np.asarray(frames[0].convert("RGB")))
    PICTURE.save(tmp_path / "photo.jfif", "JPEG")
    assert seen(tmp_path / "photo.jfif").shape == LEVELS.shape


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damage_is_a_picture_s_own(name):
    """Any damage yields a picture of some size or one error type."""
    draw, whole = random.Random(name), encoded(PICTURE, name)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            assert read_pixels(io.BytesIO(damaged)).shape[0] == 3
        except UnusablePicture:
            continue


def test_a_png_whose_extras_are_damaged_keeps_its_pixels():
    whole = encoded(PICTURE, "PNG")
    end = whole.index(b"IDAT") - 4
    for kind, content in ((b"zTXt", b"a\0\0junk"), (b"iCCP", b"a\0\0junk"), (b"pHYs", b"")):
        chunk = struct.pack(">I", len(content)) + kind + content
        chunk += struct.pack(">I", zlib.crc32(kind + content))
        assert torch.equal(
            torch.from_numpy(seen(whole[:end] + chunk + whole[end:])), torch.from_numpy(LEVELS)
        )
