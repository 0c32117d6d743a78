"""How an exception is told to the user."""

import subprocess
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from shared.errors import USER_ERROR, UserError
from shared.outcome import failure_of

ROOT = Path(__file__).resolve().parents[2]


class _Corrupt:
    """A data set whose only image cannot be read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("faces/1.jpg: the image is corrupt;\nfetch it again")


def test_a_mistake_met_in_a_loader_worker_is_the_same_line_as_without_workers():
    for workers in (0, 1):
        try:
            next(iter(DataLoader(_Corrupt(), num_workers=workers)))
        except UserError as error:
            failure = failure_of(error)
        assert failure.message == "faces/1.jpg: the image is corrupt; fetch it again"
        assert (failure.kind, failure.code) == ("user", USER_ERROR)


def test_the_log_is_the_scripts_file_else_where_stdout_goes(tmp_path, monkeypatch):
    show = [sys.executable, "-c", "from shared import outcome; print(outcome.log_file())"]
    monkeypatch.delenv("TOOLKIT_LOG", raising=False)
    assert subprocess.run(show, cwd=ROOT, capture_output=True, check=True).stdout == b"None\n"
    path = tmp_path / "run.log"
    with path.open("w") as log:
        subprocess.run(show, cwd=ROOT, stdout=log, check=True)
    assert path.read_text() == f"{path}\n"
    monkeypatch.setenv("TOOLKIT_LOG", "/logs/a b.log")
    assert (
        subprocess.run(show, cwd=ROOT, capture_output=True, check=True).stdout == b"/logs/a b.log\n"
    )
