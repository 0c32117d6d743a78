"""--dry-run refuses a typed path that is not there, and shows every remark of a run."""

import importlib
import json
import pickle
import warnings
from pathlib import Path

import pytest

from shared import weights
from shared.errors import UserError
from tests.arcface_nano import build_inshop, write_config
from tests.harness import Outcome, run_here

GONE = "/nowhere/at/all"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the little that each script looks at before the path in question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "best_model.pt").touch()
    adapter = {"target_modules": ["vision_tower"], "base_model_name_or_path": "owner/name"}
    for name, files in {
        "adapter": {"adapter_config.json": adapter},
        "model": {"config.json": {}, "pytorch_model.bin": {}},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(json.dumps(content))
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "krater"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, "images": []}]))
    return tmp_path


def dry_run(script: str, line: str) -> Outcome:
    return run_here(importlib.import_module(script).main, [*line.split(), "--dry-run"])


SFT = "sft --output_dir out --- --model model --dataset rows.json "
CASES = {
    "face: faces": ("face_distill.train_distill", f"--data-root {GONE}"),
    "face: a student": ("face_distill.evaluate", f"--checkpoint {GONE}"),
    "face: a tower": (
        "face_distill.evaluate",
        f"--checkpoint best_model.pt --blip-path {GONE}",
    ),
    "face: a teacher": ("face_distill.extract_teacher", f"--weights {GONE}"),
    "lavic: a base model": ("lavic.src.knowledge_distillation", f"--model-name {GONE}"),
    "lavic: its base model": (
        "lavic.src.evaluate",
        f"--checkpoint adapter --model-name {GONE}",
    ),
    "lavic: its data": ("lavic.src.evaluate", f"--checkpoint adapter --data-root {GONE}"),
    "vasevqa: a system prompt": (
        "vasevqa.model.evaluate",
        f"--checkpoint model --before none --data-root rows.json --system {GONE}.txt",
    ),
    "vasevqa: a checkpoint": ("vasevqa.model.train", SFT + f"--resume_from_checkpoint {GONE}"),
    "vasevqa: a run": ("vasevqa.model.train", SFT + f"--resume {GONE}"),
    "vasevqa: an adapter": ("vasevqa.model.train", SFT + f"--adapters {GONE}"),
    "multimodal: an open_clip file": (
        "multimodal.run_training",
        f"--data-root data --pretrained {GONE}",
    ),
    "multimodal: data": (
        "multimodal.evaluate",
        f"--checkpoint best_model.pt --data-root {GONE}",
    ),
    "multimodal: cookies": (
        "multimodal.download_datasets",
        f"--datasets audiocaps --cookies {GONE}",
    ),
    "multimodal: sounds": (
        "multimodal.download_datasets",
        f"--datasets audiocaps --audiocaps-source local:{GONE}",
    ),
    "multimodal: data that are not to be fetched": (
        "multimodal.run_all",
        f"--skip-download --data-root {GONE}",
    ),
    "multimodal: sounds of the chain": (
        "multimodal.run_all",
        f"--audiocaps-source local:{GONE}",
    ),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("script", "line"), CASES.values(), ids=CASES)
def test_a_typed_path_that_is_not_there_is_refused(script: str, line: str) -> None:
    outcome = dry_run(script, line)
    assert outcome.code == 2, outcome.text
    assert GONE in outcome.last_line and "Traceback" not in outcome.text


@pytest.fixture(scope="session")
def inshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inshop(tmp_path_factory.mktemp("nano"))


def arcface(place: Path, inshop: Path, options: str) -> Outcome:
    config = write_config(place / "nano.py")
    line = f"--config {config} --data-root {inshop} --run-dir run --cfg-options {options}"
    return dry_run("arcface.run_scripts.run_arcface", line)


@pytest.mark.parametrize(
    "option",
    [
        f"load_from={GONE}",
        f"model.image_encoder.0.init_cfg={{'type':'Pretrained','checkpoint':'{GONE}'}}",
        f"model.head.margins={GONE}",
    ],
)
def test_arcface_looks_for_the_files_that_a_configuration_names(
    place: Path, inshop: Path, option: str
) -> None:
    outcome = arcface(place, inshop, option)
    assert outcome.code == 2, outcome.text
    assert GONE in outcome.last_line


def test_arcface_names_settings_of_no_effect_as_a_run_does(place: Path, inshop: Path) -> None:
    outcome = arcface(place, inshop, "train_cfg.max_epoch=5 optim_wraper=1")
    assert outcome.code == 0, outcome.text
    assert "train_cfg.max_epoch" in outcome.text and "did you mean" in outcome.text
    assert "optim_wraper" in outcome.text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train_dataloader.dataset.pipeline.1.type=Resise", "there is no step Resise"),
        ("param_scheduler.0.type=CosineAnealingLR", "param_scheduler.0.type"),
    ],
)
def test_arcface_reads_pipelines_and_schedules(
    place: Path, inshop: Path, option: str, words: str
) -> None:
    outcome = arcface(place, inshop, option)
    assert outcome.code == 2, outcome.text
    assert words in outcome.last_line


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_raw_pickle_is_refused_without_a_warning(
    tmp_path: Path, suffix: str, protocol: int
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps({"a": [1.0]}, protocol))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(UserError, match=r"not a weight file|no state dict|damaged"):
            weights.read(path)
    assert [str(warning.message) for warning in shown] == []
