"""What users do wrong with arcface: one line that says what and what to do, exit code 2."""

import pytest

from arcface.run_scripts import run_arcface
from tests.arcface_nano import build_inshop, write_config
from tests.harness import run_here


@pytest.fixture(scope="module")
def inshop(tmp_path_factory):
    return build_inshop(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def flags(inshop, tmp_path):
    config = write_config(tmp_path / "nano.py")
    return ["--config", config, "--data-root", inshop, "--work-dir", tmp_path / "work"]


def test_a_malformed_list_is_refused_with_its_line_before_torch_is_loaded(flags, tmp_path):
    root = build_inshop(tmp_path / "broken", 2, 1)
    path = root / "Eval" / "list_eval_partition.txt"
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace("train", "trian")
    path.write_text("\n".join(lines))
    outcome = run_here(run_arcface.main, [*flags, "--data-root", root, "--dry-run"])
    assert outcome.code == 2
    assert "line 8: status 'trian'" in outcome.last_line and "mean train?" in outcome.last_line


def test_pictures_that_cannot_be_read_are_left_out_and_named(flags, tmp_path):
    root = build_inshop(tmp_path / "holes")
    listed = (root / "Eval" / "list_eval_partition.txt").read_text().splitlines()
    query = root / "Img" / next(line.split()[0] for line in listed if line.endswith("query"))
    query.write_bytes(b"no picture")
    outcome = run_here(
        run_arcface.main,
        [*flags, "--data-root", root, "--cfg-options", "train_cfg.max_epochs=1"],
    )
    assert outcome.code == 0, outcome.text
    assert f"left out: {query}" in outcome.text and "retrieval/Recall@1" in outcome.text
