"""What is not a regular file (a pipe, a device, a socket) in place of one that is read.

A pipe without a writer is waited for without end, a link to /dev/zero is read until memory ends.
Each reader's answer to a pipe and a device: tests/unit/test_fuzz.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arcface.run_scripts import run_arcface
from shared import images
from shared.files import read_json
from tests import pictures, vase_filter_nano
from tests.faults import probe_recipe
from tests.harness import ROOT, run_here, run_to_end
from vasevqa.filter import clipfilter1

MONITOR = ROOT / "shared" / "tools" / "monitor.py"
REPORT = ROOT / "shared" / "tools" / "report.py"
NOT_READ = "not a regular file"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    os.chdir(here)


KINDS = [pipe, device, unix_socket]


@pytest.fixture(autouse=True)
def _limited_memory() -> Iterator[None]:
    """A device that is read ends in MemoryError, not with the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 8 * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def replaced(path: Path, put: Callable[[Path], None]) -> Path:
    path.unlink(missing_ok=True)
    put(path)
    return path


@pytest.mark.slow
def test_a_filter_scores_the_other_pictures(tmp_path):
    views = vase_filter_nano.write_views(tmp_path / "in", 2, 2)
    path = replaced(next(views.rglob("*.jpg")), pipe)
    outcome = run_here(
        clipfilter1.main,
        ["--input_dir", views, "--output_dir", tmp_path / "out", "--threshold", 0,
         "--model_cache_dir", vase_filter_nano.write_clip(tmp_path / "clip"),
         "--cache_dir", tmp_path / "cache", "--workers", 0],
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    report = read_json(tmp_path / "out" / "filtering_report.json")
    name = path.relative_to(views).as_posix()
    assert report["unreadable"] == [{"filename": name, "reason": f"cannot be read: {NOT_READ}"}]
    assert len(report["results"]) == 3
    placed = tmp_path / "out" / "quarantine" / name
    assert placed.is_symlink() and placed.readlink() == path.resolve()


def test_a_png_that_ends_torchvisions_decoder_is_refused(tmp_path):
    """Zeros in bytes 200 to 249 end the process there (SIGSEGV)."""
    whole = pictures.encoded(pictures.picture(height=112, width=112), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    with pytest.raises(ValueError, match="damaged"):
        images.read_rgb(path)


@pytest.mark.parametrize("put", KINDS)
@pytest.mark.parametrize("main", [probe_recipe.main, run_arcface.main], ids=["probe", "arcface"])
def test_settings_are_refused_by_name(tmp_path, main, put):
    path = replaced(tmp_path / "settings.yaml", put)
    outcome = run_here(main, ["--config", path])
    assert outcome.code == 2, outcome.text
    assert f"--config {path}" in outcome.last_line


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir, "--epochs", 1])
    assert outcome.code == 0, outcome.text
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("put", KINDS)
def test_monitor_and_report_say_what_they_could_not_read(run_dir, put):
    replaced(run_dir / "status.json", put)
    watched = run_to_end([MONITOR, run_dir])
    assert watched.code == 1 and "status.json is missing or not readable" in watched.text
    assert run_to_end([REPORT, run_dir]).code == 0
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "status.json cannot be read" in page and NOT_READ in page


def test_monitor_and_report_show_the_rest_of_the_run(run_dir):
    status = read_json(run_dir / "status.json") | {"log": str(run_dir / "train.log")}
    (run_dir / "status.json").write_text(json.dumps(status))
    for name in ("metrics.jsonl", "config.json", "train.log"):
        replaced(run_dir / name, pipe)
    watched = run_to_end([MONITOR, run_dir, "--json"])
    assert watched.code == 0 and json.loads(watched.text)["state"] == "done"
    assert run_to_end([REPORT, run_dir]).code == 0
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "metrics.jsonl cannot be read" in page and "config.json cannot be read" in page


@pytest.mark.parametrize("name", ["status.json", "config.json", "last.pt"])
def test_the_same_command_starts_beside_what_is_no_file(run_dir, name):
    replaced(run_dir / name, pipe)
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir, "--epochs", 1])
    assert outcome.code == 0, outcome.text


def test_a_checkpoint_that_was_named_is_refused(run_dir):
    path = replaced(run_dir / "last.pt", pipe)
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir, "--resume", path])
    assert outcome.code == 2 and str(path) in outcome.last_line
