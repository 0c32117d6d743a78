"""real_weights.sh of every recipe: what is missing, the plan, and the chain on stubs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.pages import RECIPES

FIGURES = {  # file of the result → its content, and what the report makes of it
    "face_distill": (
        "checkpoints_real/evaluation/verification.json",
        {"metrics": {"lfw": {name: {"accuracy": share} for name, share in (
            ("untrained student", 0.6), ("student", 0.9025))}}},
        "untrained 60.00 %, student 90.25 %",
    ),
    "lavic": (
        "src/out_real/status.json",
        {"result": {"before": 2.4711, "after": 0.5812, "n": 180}},
        "val_loss 2.471 before, 0.5812 after, 500 products, N 180",
    ),
    "vasevqa": (
        "model/output_real/evaluation/vqa.json",
        {"before": {"contained": 0.25}, "metrics": {"contained": 0.4}, "majority": 0.3},
        "base 25.00 %, after SFT 40.00 %, majority answer 30.00 %",
    ),
    "multimodal": (
        "outputs_real/evaluation/evaluation.json",
        {"metrics": {"clotho/audio_to_text/R@1": 0.05, "clotho/text_to_audio/R@1": 0.04}},
        "sound to text 5.00 %, text to sound 4.00 %",
    ),
    "arcface": (
        "work_dirs/real/evaluation/retrieval.json",
        {"metrics": {"retrieval/Recall@1": 90.24, "retrieval/mAP@10": 70.17}},
        "Recall@1 90.24, mAP@10 70.17",
    ),
}  # fmt: skip
DATA = {
    "face_distill": (
        *("datasets/faces_emore/train.rec", "datasets/faces_emore/lfw.bin"),
        "teacher_features_12k/teacher_embedding.npy",
    ),
    "lavic": ("data/item2meta_train.json", "data/item2meta_valid.jsonl"),
    "vasevqa": ("model/data/video_training_dataset.json", "model/data/questions.json"),
    "multimodal": (),
    "arcface": ("data/inshop/Eval/list_eval_partition.txt",),
}
# With a GPU or without; what it is asked to run is written down.
PYTHON = """#!/bin/sh
case $1 in
  -P | -c)
    case $2 in *present_gpus*) exit {gpu} ;; *get_device_name*) echo "torch 2" && exit ;; esac
    exec "{python}" "$@" ;;
esac
printf '%s\\n' "$*" >>"{calls}"
"""


@pytest.fixture(params=RECIPES)
def site(request: pytest.FixtureRequest, house):
    house.recipe = request.param
    house.script = house.root / house.recipe / "real_weights.sh"
    house.take(*(f"shared/shell/{name}.sh" for name in ("common", "log", "real")))
    house.take(f"{house.recipe}/real_weights.sh")
    house.calls = house.bin.parent / "calls"
    for tool in ("sed", "sort", "head", "nproc"):
        link = house.bin / tool
        if not link.exists():
            link.symlink_to(f"/usr/bin/{tool}")
    house.write("7z", "#!/bin/sh\n", house.bin)
    for stage in ("sft", "merge"):
        house.write(
            f"vasevqa/model/{stage}.sh", f'#!/bin/sh\necho "{stage} $*" >>"{house.calls}"\n'
        )
    gpu_python(house, gpu=True)
    return house


def gpu_python(site, *, gpu: bool) -> None:
    text = PYTHON.format(gpu=0 if gpu else 1, python=sys.executable, calls=site.calls)
    site.env["PYTHON"] = str(site.write("python", text, site.bin))


def put_data(site) -> None:
    for name in DATA[site.recipe]:
        path = site.root / site.recipe / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")


def test_it_says_what_it_needs_and_would_do_and_runs_nothing(site):
    gpu_python(site, gpu=False)
    result = site.run(site.script, "--help")
    assert result.returncode == 0
    assert "NEEDS A DOWNLOAD" in result.stdout and "GPU" in result.stdout
    result = site.run(site.script)
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("missing: an NVIDIA GPU")
    assert all(Path(name).name in line for name in DATA[site.recipe][:1])
    result = site.run(site.script, "--dry-run", "--seed", "7")
    assert result.returncode == 0, result.stderr
    assert "missing: an NVIDIA GPU" in result.stderr
    assert "--seed 7" in result.stdout
    assert not site.calls.exists()


def test_the_chain_ends_with_a_line_to_paste_or_with_the_code_of_what_failed(site):
    put_data(site)
    name, content, said = FIGURES[site.recipe]
    file = site.root / site.recipe / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    result = site.run(site.script)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"to paste: | {site.recipe} | ")
    assert said in last
    assert len(site.calls.read_text(encoding="utf-8").splitlines()) >= 2
    text = PYTHON.format(gpu=0, python=sys.executable, calls=site.calls) + "exit 2\n"
    site.write("python", text, site.bin)
    result = site.run(site.script)
    assert result.returncode == 2
    assert "to paste" not in result.stdout
