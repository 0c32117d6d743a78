"""The document's commands of the filters, typed as they stand, on small data at its places."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.files import read_json
from tests.harness import ROOT, environment
from tests.vase_filter_nano import furnish

pytestmark = [pytest.mark.full, pytest.mark.limit(900)]

# In the order of the flow; a CLIP lies in ./model as the page tells.
COMMANDS = (
    "python model.py --estimate",
    "torchrun --nproc_per_node 4 model.py",
    "python model.py --num_epochs 50 --patience 8 --amp",
    "python model.py",
    "python classifier.py --threshold 0.8 --link",
    "python classifier.py",
    "./clipfilter1.sh 1",
    "./clipfilter1.sh 6",
    "python clipfilter1.py --analyze_only --input_dir ./images3/1",
    "python clipfilter1.py --input_dir ./images3/1 --output_dir ./filtered_vases"
    " --threshold 0.15 --model_cache_dir ./model",
    "torchrun --nproc_per_node 4 clipfilter1.py",
    "./clipfilter1.sh 3 --threshold 0.15",
    "./clipfilter1.sh 4 --yes",
    "./clipfilter1.sh 2 --yes",
    "python clipfilter2.py --input_dir ./filtered_vases/accepted --output_dir ./filtered_vases",
)


@pytest.fixture(scope="module")
def filter_(tmp_path_factory) -> Path:
    """vasevqa/filter with small data at the documented places, its constants edited."""
    root = tmp_path_factory.mktemp("a house")
    ours = shutil.ignore_patterns(
        "demo", "logs", "__pycache__", "images", "images[0-9]", "filtered*", ".*"
    )
    # a copy: shared/launch.py puts the directory above it, links followed, first on the path
    for name in ("vasevqa/filter", "vasevqa/demo_data", "shared"):
        shutil.copytree(ROOT / name, root / name, ignore=ours)
    shutil.copy(ROOT / "vasevqa" / "__init__.py", root / "vasevqa" / "__init__.py")
    (root / ".venv").symlink_to(Path(sys.prefix))
    furnish(root / "vasevqa" / "filter")
    return root / "vasevqa" / "filter"


def test_the_documents_flow_runs_as_it_is_typed(filter_):
    for command in COMMANDS:
        words: list[str] = [*command.split()]
        if words[0] in ("python", "torchrun"):
            words[0] = str(Path(sys.executable).with_name(words[0]))
        done = subprocess.run(
            words, cwd=filter_, env=environment(HF_HUB_OFFLINE="1"), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (filter_ / "best_image_quality_model.pth").is_file()
    assert (filter_ / "training_history.png").is_file()
    sorted_out = read_json(filter_ / "images3" / "classification_report.json")
    assert sorted_out["total_images"] == 18 == sorted_out["high_quality_images"]
    out = filter_ / "filtered_vases"
    report = json.loads((out / "filtering_report.json").read_text())
    assert report["input_directory"] == str(filter_ / "images3" / "1")
    assert report["total_images"] == 18 == report["accepted_images"] + report["rejected_images"]
    assert 0.6 <= report["acceptance_rate"] <= 0.9
    assert read_json(out / "filtering_stats.json")["summary"]["total_vases"] >= 4
    assert list((filter_ / "logs").glob("clipfilter1_*.log"))
