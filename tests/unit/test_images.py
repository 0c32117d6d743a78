"""Pictures decoded as by Pillow, refused with a reason; those of a folder; what is skipped."""

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import UserError
from shared.images import FORMATS, Skipped, decode_rgb, find_images, printable, problem, read_rgb
from tests.pictures import claiming, damaged, encoded, picture, with_pillow

# --- which files ----------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_and_sorted_by_their_relative_path(tmp_path):
    names = ["b/a b.JPG", "b/张三/01.jpeg", "a.png", "b.webp", "a-1/x.bmp", "a/x.bmp"]
    for name in [*names, "notes.txt", "b/._a.jpg", ".cache/y.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(names)


def test_links_that_lead_back_are_left_out_and_links_elsewhere_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "people", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "again").symlink_to(root / "people")
    (root / "more").symlink_to(elsewhere)
    (elsewhere / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert find_images(root) == ["more/x.jpg", "people/x.jpg"]


def test_a_file_or_nothing_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    for wrong in (tmp_path / "a.jpg", tmp_path / "none"):
        with pytest.raises(UserError, match="is not a folder"):
            find_images(wrong)


def test_names_that_are_no_text_can_be_shown(tmp_path):
    (tmp_path / os.fsdecode(b"\xff\n.jpg")).touch()
    (name,) = find_images(tmp_path)
    assert printable(name) == "\\xff\\n.jpg"
    assert printable("张 三/a.jpg") == "张 三/a.jpg"


# --- decoding -------------------------------------------------------------------------------------


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("RGB", "L", "LA", "RGBA", "P", "1"),
    "GIF": ("RGB", "L", "P", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "L", "CMYK", "RGBA", "P"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("RGB", "L", "RGBA"),
    "DDS": ("RGB", "L", "RGBA"),
    "ICNS": ("RGB", "RGBA"),
    "ICO": ("RGB", "RGBA"),
    "PPM": ("RGB", "L", "1"),
}


def coloured(mode, seed=0):
    """A picture in a mode of Pillow's; one with transparency has all degrees of it."""
    image = picture(seed, 32, 48)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def exif(orientation):
    note = Image.Exif()
    note[0x0112] = orientation
    return note


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_mode_gives_pillows_picture(kind):
    for mode in MODES[kind]:
        for orientation in (1, 6):
            content = encoded(coloured(mode), kind, exif=exif(orientation))
            image = decode_rgb(content)
            assert image.dtype == torch.uint8 and image.stride() == (1, 3 * image.shape[2], 3)
            assert torch.equal(image, with_pillow(content)), mode


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])  # decoded by torchvision, by Pillow
def test_a_sideways_photograph_is_turned_upright_and_a_damaged_note_says_nothing(kind):
    for orientation in range(1, 9):
        content = encoded(coloured("RGB"), kind, exif=exif(orientation))
        image = decode_rgb(content)
        assert torch.equal(image, with_pillow(content))
        assert image.shape[1:] == ((32, 48) if orientation < 5 else (48, 32))
    content = encoded(coloured("RGB"), kind, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert torch.equal(decode_rgb(content), decode_rgb(encoded(coloured("RGB"), kind)))


def test_transparent_pixels_of_a_gif_keep_their_colour_and_the_first_frame_counts():
    first, second = (picture(seed).quantize(16) for seed in range(2))
    colours = {"transparency": 3, "background": 7}
    content = encoded(first, "GIF", save_all=True, append_images=[second], **colours)
    assert torch.equal(decode_rgb(content), with_pillow(content))


def test_sixteen_bits_become_eight():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = torch.from_numpy(levels.astype(np.uint8)).expand(3, 16, 16)
    for more in (0, 256):  # all of them lie in the same 256th part
        image = Image.fromarray(np.minimum(levels.astype(int) * 257 + more, 65535).astype("uint16"))
        assert torch.equal(decode_rgb(encoded(image, "PNG")), expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (bytes(500), "zeros alone"),
        (b"<!DOCTYPE html><html></html>", "no picture: it begins with '<!DOCTYPE html>"),
        (encoded(picture())[:-20], "(?i)truncated|not processed"),
        (encoded(picture(), "PNG")[:200], "."),
        (b"\xff\xd8\xff", "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "begins with '%!PS-Adobe"),
    ],
)
def test_what_is_no_whole_picture_is_refused_in_one_line(content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        decode_rgb(content)
    assert "\n" not in str(caught.value)


def icon_of(inner):
    return struct.pack(">4sI4sI", b"icns", 16 + len(inner), b"ic07", 8 + len(inner)) + inner


BOMBS = {
    "PNG": lambda: encoded(Image.new("1", (11_000, 11_000)), "PNG"),
    "PNG that Pillow refuses": lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    "JPEG": lambda: claiming(encoded(picture()), 65_000, 65_000),
    "progressive JPEG": lambda: claiming(encoded(picture(), progressive=True), 65_000, 65_000),
    "icon": lambda: icon_of(encoded(Image.new("1", (20_000, 20_000)), "PNG")),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_claims_to_be_enormous_is_refused(kind):
    bomb = BOMBS[kind]()
    assert len(bomb) < 1 << 17
    with pytest.raises(ValueError, match="more than 100,000,000 pixels"):
        decode_rgb(bomb)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "DDS", "ICNS", "ICO"])  # others: test_fuzz.py
def test_damage_is_a_reason_whatever_the_decoder_raises(kind):
    whole = encoded(picture(), kind)
    refused = 0
    for seed in range(40):
        try:
            assert decode_rgb(damaged(whole, seed)).dtype == torch.uint8
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert refused


# --- files and what is left out -------------------------------------------------------------------


def test_a_file_gives_the_picture_of_its_bytes(tmp_path):
    path = tmp_path / "图 1.jpg"
    path.write_bytes(encoded(picture()))
    assert torch.equal(read_rgb(path), decode_rgb(path.read_bytes()))
    assert problem(path) is None


def test_files_that_give_no_picture_say_why(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert problem(tmp_path / "zero.jpg") == "cannot be read: not a regular file"
    assert problem(tmp_path / "folder.jpg") == "cannot be read: Is a directory"
    assert problem(tmp_path / "empty.jpg") == "the file is empty"
    assert problem(tmp_path / "link.jpg") == "a link that leads nowhere"
    assert problem(tmp_path / "pipe.jpg") == "cannot be read: not a regular file"
    assert problem(tmp_path / "none.jpg") == "missing"
    for name, reason in [("none.jpg", "missing"), ("pipe.jpg", "not a regular file")]:
        with pytest.raises(ValueError, match=reason):
            read_rgb(tmp_path / name)


def test_what_is_skipped_is_named_once_and_counted_by_reason(caplog):
    skipped = Skipped()
    for name, reason in [("a", "missing"), ("b", "empty"), ("c", "missing"), ("a", "empty")]:
        skipped.add(name, reason)
    assert skipped.count == 3 and skipped.reasons == {"missing": 2, "empty": 1}
    named = ("a (missing)", "b (empty)", "c (missing)")
    assert caplog.messages == [f"left out: {text}" for text in named]


def test_too_many_skipped_are_refused_with_the_first_as_example():
    skipped = Skipped("clips")
    skipped.add("a.wav", "missing")
    skipped.refuse_above(0.5, 2)
    skipped.add("b.wav", "empty")
    with pytest.raises(UserError, match=r"2 of 3 clips .* at most 50% .*a\.wav \(missing\)"):
        skipped.refuse_above(0.5, 3)
