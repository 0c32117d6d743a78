"""multimodal's README commands, typed as they stand, on small data at the documented places.

Every command of the page is in one of the tables here; a new one fails until it is. config.yaml is
edited as the page says: the nano model, a few epochs. A typed size or number of epochs is replaced
by `SMALLER`, and run_all is told that the data is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.files import read_json
from tests import multimodal_data
from tests.harness import ROOT, environment, finished, status_of

pytestmark = [pytest.mark.full, pytest.mark.serial, pytest.mark.limit(1800)]

SMALLER = {
    "--model-size base": "--model-size nano",
    "--epochs 100": "--epochs 6",
    "--epochs 50": "--epochs 3",
    "checkpoint_epoch_50": "checkpoint_epoch_4",
}
TRAINED = "python run_training.py --model-size base --batch-size 8 --epochs 100"
RESUMED = "python run_training.py --resume outputs/checkpoints/checkpoint_epoch_50.pt"
TORCHRUN = "torchrun --nproc_per_node=4 run_training.py"
EVALUATIONS = {
    "python evaluate.py": "test",
    "python evaluate.py --datasets coco clotho --split val": "val",
    "python evaluate.py --demo": "test",
}
EMBEDDINGS = (
    'python embed.py --images photos/ --audio sounds/ --query "a dog barks"',
    "python embed.py --images photos/ --texts captions.txt --audio sounds/",
    "python embed.py --images photos/ --labels labels.txt",
)
WHOLE = ("./run_all.sh", "./run_all.sh --model-size base --batch-size 8 --epochs 50")
HERE = (
    *("chmod +x run_all.sh", TRAINED, RESUMED, TORCHRUN),
    *(*EVALUATIONS, *EMBEDDINGS, *WHOLE),
)
DOWNLOAD = "python download_datasets.py --datasets"
SERVED = "a local server: tests/recipes/test_multimodal_download.py"
ELSEWHERE = {
    "tensorboard --logdir=./outputs/logs/tensorboard": "tests/full/test_documented_commands.py",
    "./real_weights.sh --dry-run": "tests/shell/test_real_weights_sh.py",
    "./run_all.sh --demo": "tests/recipes/test_multimodal_run_all.py",
    "bash setup_environment.sh": "tests/shell/test_multimodal_setup.py",
    f"{DOWNLOAD} coco": SERVED,
    f"{DOWNLOAD} coco clotho audiocaps": SERVED,
    f"{DOWNLOAD} all": SERVED,
    f"{DOWNLOAD} all --dry-run": SERVED,
}
NEEDS = {
    "./real_weights.sh": "a GPU and a download; on stubs: tests/shell/test_real_weights_sh.py",
    "source venv/bin/activate": "what setup_environment.sh makes out of the network",
}
SETTINGS = {  # config.yaml, edited
    "  size: base": "  size: nano\n  pretrained: random",
    "  epochs: 100": "  epochs: 3\n  checkpoint_every: 2\n  workers: 0\n  clip_seconds: 1.0",
    "  batch_size: 8": "  batch_size: 2",
    "  gradient_accumulation_steps: 4": "  gradient_accumulation_steps: 2",
}


def test_every_command_of_the_page_is_run_or_says_what_it_needs():
    page = (ROOT / "multimodal" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    lines = (re.sub(r"\s+# .*", "", line).strip() for b in blocks for line in b.splitlines())
    assert {line for line in lines if line} == {*HERE, *ELSEWHERE, *NEEDS}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The recipe in a directory of its own, small data where the page says, config.yaml edited."""
    root = tmp_path_factory.mktemp("a house")
    recipe = root / "multimodal"
    ours = shutil.ignore_patterns("demo", "logs", "data", "outputs*", "venv", "__pycache__", ".*")
    for name in ("multimodal", "shared"):  # copies: scripts and launch look beside their real place
        shutil.copytree(ROOT / name, root / name, ignore=ours)
    (root / ".venv").symlink_to(Path(sys.prefix))
    made = multimodal_data.build(tmp_path_factory.mktemp("data"))
    made.data_root.rename(recipe / "data")
    text = (recipe / "config.yaml").read_text(encoding="utf-8")
    for old, new in SETTINGS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (recipe / "config.yaml").write_text(text, encoding="utf-8")
    furnish(recipe)
    return recipe


def furnish(recipe: Path) -> None:
    """Pictures, sounds, captions and labels of one's own."""
    for folder, files in (
        ("photos", sorted((recipe / "data" / "coco" / "val2017").glob("*.jpg"))[:6]),
        ("sounds", sorted((recipe / "data" / "clotho" / "evaluation").glob("*.wav"))[:4]),
    ):
        assert len(files) >= 4
        (recipe / folder).mkdir()
        for file in files:
            shutil.copy(file, recipe / folder)
    (recipe / "captions.txt").write_text("a red circle\ntwo blue stars\na bell\n")
    (recipe / "labels.txt").write_text("circle\nstar\n")


@pytest.fixture(scope="module")
def trained(house) -> Path:
    """The same after six epochs."""
    finished(typed(TRAINED, house))
    return house


def in_this_house() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment(PATH=path, HF_HUB_OFFLINE="1")


def typed(command: str, house: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a shell, as a user types it but smaller, with the environment active."""
    for documented, here in SMALLER.items():
        command = command.replace(documented, here)
    return subprocess.run(
        ["bash", "-c", " ".join([command, *more])], cwd=house, env=in_this_house(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


def test_training_leaves_what_the_page_lists(trained):
    outputs = trained / "outputs"
    status = status_of(outputs)
    assert (status["state"], status["world_size"]) == ("done", 1)
    names = {path.name for path in (outputs / "checkpoints").iterdir()}
    assert {"best_model.pt", "final_model.pt", "checkpoint_epoch_4.pt"} <= names
    assert list((outputs / "logs" / "tensorboard").glob("events.out.tfevents*"))
    assert {path.suffix for path in (outputs / "reports").glob("report_*")} >= {".json", ".md"}


def test_it_goes_on_at_a_checkpoint(trained):
    steps = status_of(trained / "outputs")["step"]
    finished(typed(RESUMED, trained))
    status = status_of(trained / "outputs")
    assert (status["state"], status["step"]) == ("done", steps)  # all six epochs, as it was asked


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluation_as_documented(trained, command):
    outputs = trained / "outputs"
    if "--demo" in command:  # reads what the demo leaves
        outputs = trained / "demo" / "runs" / "outputs"
        shutil.copytree(trained / "outputs", outputs, dirs_exist_ok=True)
        shutil.rmtree(outputs / "evaluation", ignore_errors=True)
    said = finished(typed(command, trained))
    assert "R@1" in said and EVALUATIONS[command] in said
    rows = read_json(outputs / "evaluation" / "evaluation.json")
    assert rows and (outputs / "evaluation" / "evaluation.txt").is_file()
    assert ("audiocaps" in said.lower()) == ("--datasets" not in command)


def test_embeddings_as_documented(trained):
    found = trained / "embeddings"
    for command in EMBEDDINGS:
        finished(typed(command, trained))
        names = read_json(found / "embeddings.json")
        images = np.load(found / "images.npy")
        assert images.shape == (6, 512) and len(names["images"]) == 6
        np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-4)
    assert read_json(found / "zero_shot.json")


def test_four_processes_and_the_whole_way_as_documented(trained):
    finished(typed(TORCHRUN, trained))
    status = status_of(trained / "outputs")
    assert (status["state"], status["world_size"]) == ("done", 4)
    finished(typed(HERE[0], trained))
    for command in WHOLE:
        finished(typed(command, trained, "--skip-download"))
        assert status_of(trained / "outputs")["state"] == "done"
        assert (trained / "outputs" / "evaluation" / "evaluation.json").is_file()
    stages = {path.stem for path in (trained / "outputs_stages").glob("*.json")}
    assert {"preflight", "environment", "training", "evaluation", "report"} <= stages
    log = max((trained / "logs").glob("run_all*.log"), key=lambda path: path.stat().st_mtime)
    assert "exit 0" in log.read_text(encoding="utf-8")
