"""The demo of multimodal reaches its figure, with its own data and with another seed's."""

from pathlib import Path

import pytest

from multimodal import run_training
from multimodal.demo_data import demo
from shared.files import read_json
from tests.harness import run_here

pytestmark = [pytest.mark.full, pytest.mark.limit(900)]


def as_flags(settings: dict[str, object]) -> list[object]:
    flags: list[object] = []
    for name, value in settings.items():
        dashed = name.replace("_", "-")
        flags += [f"--{dashed}", value] if not isinstance(value, bool) else (
            [f"--{dashed}" if value else f"--no-{dashed}"]
        )  # fmt: skip
    return flags


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_find_each_other_five_times_as_often_as_by_chance(seed, tmp_path: Path):
    paths = demo.build(tmp_path / "demo", seed=seed)
    flags = as_flags(run_training.DEMO)
    flags += ["--data-root", paths.data_root, "--output-dir", tmp_path / "outputs", "--seed", seed]
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 0, outcome.text
    report = read_json(next((tmp_path / "outputs" / "reports").glob("report_*.json")))
    found = {row["pairs"]: row["R@1 after"] / row["chance"] for row in report["summary"]}
    assert min(found[name] for name in ("coco", "clotho", "audiocaps")) >= 5, found
