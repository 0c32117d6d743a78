"""Images as users keep them: found, read in every mode, refused with a reason."""

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from face_distill import image_folder
from face_distill.FaceDataset import decode
from face_distill.image_folder import Face, Unreadable, in_batches, read_face
from face_distill.npy_stream import write_rows


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels_of(path: Path) -> np.ndarray:
    face = read_face(path)
    assert isinstance(face, Face), face
    assert face.pixels.shape == (3, 112, 112) and face.pixels.dtype == np.uint8
    return face.pixels.transpose(1, 2, 0)


def reason_of(path: Path) -> str:
    found = read_face(path)
    assert isinstance(found, Unreadable)
    return found.reason


# --- what they hold -------------------------------------------------------------------------------


def test_an_aligned_jpeg_has_the_grey_levels_that_training_sees(tmp_path):
    smooth = Image.fromarray(levels(20, 20, 3)).resize((112, 112), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg")
    seen = decode((tmp_path / "a.jpg").read_bytes()).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), seen)


def test_grey_transparent_and_palette_images_become_rgb(tmp_path):
    rgb, alpha = levels(112, 112, 3), levels(112, 112, 1, seed=1)
    grey = rgb[..., 0]
    cases = {
        "grey": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "LA": (
            Image.fromarray(np.stack([grey, alpha[..., 0]], -1), "LA"),
            np.stack([grey] * 3, -1),
        ),
        "RGBA": (Image.fromarray(np.concatenate([rgb, alpha], -1)), rgb),
    }
    palette = Image.fromarray(rgb).quantize(64)
    cases["P"] = palette, np.asarray(palette.convert("RGB"))
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(pixels_of(tmp_path / f"{name}.png"), expected), name


def test_cmyk_becomes_the_colours_it_prints(tmp_path):
    ink = np.zeros((112, 112, 4), np.uint8)
    ink[..., 0] = 255  # cyan alone: no red
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.jpg", quality=100)
    shown = pixels_of(tmp_path / "a.jpg").reshape(-1, 3).mean(0)
    assert shown == pytest.approx([0, 255, 255], abs=3)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (112, 112), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    shown = pixels_of(tmp_path / "a.png")
    assert np.array_equal(shown[..., 0], (grey / 257).astype(np.uint8))
    seen = decode((tmp_path / "a.png").read_bytes()).permute(1, 2, 0).numpy()
    assert np.array_equal(shown, seen)


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_turns_the_image_upright(tmp_path, orientation, turns):
    rgb = levels(112, 112, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.rot90(rgb, turns))


@pytest.mark.parametrize("shape", [(1, 1), (500, 80), (113, 112)])
def test_another_size_is_resized_as_in_training_and_said(tmp_path, shape):
    smooth = Image.fromarray(levels(9, 9, 3)).resize(shape, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    seen = decode((tmp_path / "a.png").read_bytes()).permute(1, 2, 0).numpy()
    difference = pixels_of(tmp_path / "a.png").astype(int) - seen
    assert abs(difference).max() <= 1
    face = read_face(tmp_path / "a.png")
    assert isinstance(face, Face) and not face.is_aligned


def bomb(side: int) -> bytes:
    """A PNG of a hundred bytes that claims `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_what_cannot_be_read_comes_with_its_reason(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(levels(112, 112, 3)).save(encoded, "PNG")
    contents = {
        "the file is empty": b"",
        "no picture: it begins with '<!DOCTYPE html>": b"<!DOCTYPE html><html>none</html>",
        "no picture: it begins with 'some text'": b"some text",
        "damaged": encoded.getvalue()[: len(encoded.getvalue()) // 2],
        "10001 × 10001: more than 100,000,000 pixels": bomb(10_001),
    }
    for reason, content in contents.items():
        (tmp_path / "x.png").write_bytes(content)
        assert reason_of(tmp_path / "x.png").startswith(reason)
    (tmp_path / "x.png").write_bytes(bomb(30_000))
    assert reason_of(tmp_path / "x.png") == "more than 100,000,000 pixels"
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert reason_of(tmp_path / "gone.png") == "a link that leads nowhere"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_of(tmp_path / "pipe.png") == "cannot be read: not a regular file"


def test_a_damaged_byte_anywhere_never_raises(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(levels(112, 112, 3)).resize((16, 16)).save(encoded, "PNG")
    whole = encoded.getvalue()
    for place in range(0, len(whole), 7):
        (tmp_path / "x.png").write_bytes(whole[:place] + b"\x7f" + whole[place + 1 :])
        assert isinstance(read_face(tmp_path / "x.png"), Face | Unreadable)


# --- batches --------------------------------------------------------------------------------------


def test_batches_keep_the_order_and_decode_only_a_little_ahead(tmp_path, monkeypatch):
    read, lock = [], threading.Lock()

    def note(path: Path) -> Unreadable:
        with lock:
            read.append(path.name)
        return Unreadable("not opened")

    monkeypatch.setattr(image_folder, "read_face", note)
    names = [f"{number:03d}.jpg" for number in range(50)]
    batches = in_batches(tmp_path, names, 4, 3)
    first = next(batches)
    assert [name for name, _ in first] == names[:4]
    assert len(read) <= 12
    assert [name for batch in [first, *batches] for name, _ in batch] == names


def test_rows_are_written_as_numpy_reads_them_and_a_failure_leaves_the_old_file(tmp_path):
    path, rows = tmp_path / "a.npy", np.arange(35, dtype=np.float64).reshape(7, 5)
    assert write_rows(path, [rows[:3], rows[3:]], 5) == 7
    assert np.array_equal(np.load(path), rows.astype(np.float32))
    assert write_rows(tmp_path / "none.npy", [], 5) == 0
    assert np.load(tmp_path / "none.npy").shape == (0, 5)

    def failing():
        yield rows
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_rows(path, failing(), 5)
    assert len(np.load(path)) == 7
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
