"""Unpacking archives: whole, never outside the directory, never beyond all measure."""

import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple

import pytest

from shared import unpack as unpacking
from shared.errors import MissingToolError, UserError
from shared.unpack import unpack

SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c" + bytes(26)


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tree(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


FILES = {"val2017/a.jpg": b"picture", "val2017/b c.jpg": b"other", "annotations/x.json": b"{}"}


def test_zip_is_unpacked_beside_what_is_there(tmp_path):
    (tmp_path / "out/val2017").mkdir(parents=True)
    (tmp_path / "out/val2017/kept.jpg").write_bytes(b"kept")
    (tmp_path / "out/val2017/a.jpg").write_bytes(b"old")
    assert unpack([zipped(tmp_path / "a.zip", FILES)], tmp_path / "out") == 3
    assert tree(tmp_path / "out") == {**FILES, "val2017/kept.jpg": b"kept"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["annotations", "val2017"]


@pytest.mark.parametrize("mode", ["w", "w:xz"])
def test_tar_plain_and_compressed(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert unpack([tmp_path / "a.tar"], tmp_path / "out") == 3
    assert tree(tmp_path / "out") == FILES


def test_parts_of_a_zip_are_read_as_one(tmp_path):
    files = {f"wav/{number}.wav": os.urandom(1000) for number in range(9)}
    content = zipped(tmp_path / "whole.zip", files).read_bytes()
    parts, size = [], len(content) // 50
    for number, start in enumerate(range(0, len(content), size)):
        parts.append(tmp_path / f"part{number:03}")
        parts[-1].write_bytes(content[start : start + size])
    assert unpack(parts, tmp_path / "out") == 9
    assert tree(tmp_path / "out") == files


HOSTILE_NAMES = ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "C:\\out.txt", "..\\out.txt"]


def tar_with(path, member):
    with tarfile.open(path, "w") as archive:
        archive.addfile(member, io.BytesIO())
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "a\nb"])
def test_fault_25_archive_that_leads_out_is_refused(tmp_path, kind, name):
    path = tmp_path / "a.archive"
    if kind == "zip":
        zipped(path, {"good.txt": b"1", name: b"2"})
    else:
        tar_with(path, tarfile.TarInfo(name))
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack([path], tmp_path / "in/out")
    assert tree(tmp_path).keys() == {"a.archive"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR])
def test_fault_25_zip_with_a_link_or_device_is_refused(tmp_path, kind):
    info = zipfile.ZipInfo("a")
    info.external_attr = (kind | 0o777) << 16
    archive = zipped(tmp_path / "a.zip", {info: "/etc/passwd"})
    with pytest.raises(UserError, match="'a', which is a link or a device"):
        unpack([archive], tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_fault_25_tar_with_a_link_or_device_is_refused(tmp_path, kind):
    member = tarfile.TarInfo("a")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match="'a', which is a link or a device"):
        unpack([tar_with(tmp_path / "a.tar", member)], tmp_path / "out")


def test_fault_26_archive_that_grows_beyond_measure_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"zeros": bytes(unpacking._ALWAYS_ALLOWED + 1)})
    with pytest.raises(UserError, match="more than 100 times its size"):
        unpack([archive], tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_archive_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 96, 4))
    with pytest.raises(UserError, match="has 4 bytes free and 14 bytes"):
        unpack([zipped(tmp_path / "a.zip", FILES)], tmp_path / "out")


def test_encrypted_zip_is_refused(tmp_path):
    content = bytearray(zipped(tmp_path / "a.zip", {"a": b"1"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag, in the central directory
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="is encrypted"):
        unpack([tmp_path / "a.zip"], tmp_path / "out")


def test_damaged_zip_leaves_nothing_and_says_what_to_do(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"a": os.urandom(5000)}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[2000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"Bad CRC-32.*delete it and fetch it again"):
        unpack([archive], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"a": b"1"})
    (tmp_path / "out/.unpacking.a.zip/half").mkdir(parents=True)
    unpack([archive], tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": b"1"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a"]


def test_what_is_no_archive_is_said(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>log in</html>")
    with pytest.raises(UserError, match="is no zip, tar or 7z archive"):
        unpack([tmp_path / "a.zip"], tmp_path / "out")


def program_in(directory, monkeypatch, name, code):
    directory.mkdir()
    (directory / name).write_text(f"#!/bin/sh\n{code}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "py7zr", None)  # as if it were not installed


def run(command):
    return subprocess.run(command, check=False).returncode


def test_seven_zip_goes_to_a_program_where_py7zr_is_missing(tmp_path, monkeypatch):
    code = 'for word; do case $word in -o*) mkdir "${word#-o}/development"; \
        echo sound > "${word#-o}/development/a b.wav";; esac; done'
    program_in(tmp_path / "bin", monkeypatch, "7z", code)
    (tmp_path / "a.7z").write_bytes(SEVEN_ZIP)
    assert unpack([tmp_path / "a.7z"], tmp_path / "out", run) == 1
    assert tree(tmp_path / "out") == {"development/a b.wav": b"sound\n"}


def test_fault_25_link_that_a_program_unpacked_is_found(tmp_path, monkeypatch):
    code = 'for word; do case $word in -o*) ln -s /etc "${word#-o}/etc";; esac; done'
    program_in(tmp_path / "bin", monkeypatch, "7z", code)
    (tmp_path / "a.7z").write_bytes(SEVEN_ZIP)
    with pytest.raises(UserError, match="'etc', which is a link"):
        unpack([tmp_path / "a.7z"], tmp_path / "out", run)
    assert list((tmp_path / "out").iterdir()) == []


def test_seven_zip_that_a_program_cannot_unpack(tmp_path, monkeypatch):
    program_in(tmp_path / "bin", monkeypatch, "bsdtar", "exit 3")
    (tmp_path / "a.7z").write_bytes(SEVEN_ZIP)
    with pytest.raises(UserError, match="bsdtar ended with 3"):
        unpack([tmp_path / "a.7z"], tmp_path / "out", run)


def test_seven_zip_without_any_way_is_a_missing_tool(tmp_path, monkeypatch):
    program_in(tmp_path / "bin", monkeypatch, "nothing", "")
    (tmp_path / "a.7z").write_bytes(SEVEN_ZIP)
    with pytest.raises(MissingToolError, match="pip install py7zr"):
        unpack([tmp_path / "a.7z"], tmp_path / "out", run)
