"""Files that torch would take hours to refuse."""

import io
import time
import zipfile

import pytest

from shared import checkpoint, weights
from shared.checkpoint import DamagedError
from shared.errors import UserError

ENDLESS = b"\x80\x02ctorch\nFloat" + b"[" * 1_000_000 + b"\n."


def archive(pickled: bytes) -> io.BytesIO:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
    return written


def test_a_class_with_an_endless_name_is_refused_at_once(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(archive(ENDLESS).getvalue())
    began = time.process_time()
    with pytest.raises(DamagedError, match="a class whose name has 1,000,011"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="damaged"):
        weights.read(path)
    (tmp_path / "old.pth").write_bytes(ENDLESS)
    with pytest.raises(UserError, match="damaged"):
        weights.read(tmp_path / "old.pth")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", [b"[" * 100_000, b"\xe6" * 100_000])
def test_a_name_without_an_end_or_of_no_text_is_refused_too(tmp_path, name):
    pickled = b"\x80\x02ctorch\n" + name
    (tmp_path / "last.pt").write_bytes(archive(pickled).getvalue())
    with pytest.raises(DamagedError, match="no end"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "old.pth").write_bytes(pickled)
    with pytest.raises(UserError, match="damaged"):
        weights.read(tmp_path / "old.pth")
