"""One table of what users type and name wrongly, over all entry scripts: one line, exit code 2.

What every flag refuses by its type and range is in tests/unit/test_command_lines.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

from arcface.run_scripts import run_arcface
from face_distill.distill import model
from shared.files import write_json
from tests import trainings
from tests.harness import run_here
from tests.lavic_talks import nano
from tests.vase_filter_nano import write_quality_set, write_views

# A script, and below it what is typed => what the answer says. $tmp: prepared by `_things` below.
TABLE = """
face_distill.train_distill
  --data-root /nowhere                 => /nowhere holds no faces
  --blip-path /nowhere                 => /nowhere/config.json is missing
  --teacher-feat-dir /nowhere          => teacher_embedding.npy is missing
  --run-dir $tmp/file/run              => choose another --run-dir
  --num-classes 3                      => below the 5 identities
  --at-mode zagoruyko                  => feature maps
  --batch-size 64                      => too few for one step
  --batch-size 1                       => the loss compares pairs of images; use 2 or more
  --adapter-layers last:9              => from 1 to 4
  --amp fp16 --device cpu              => --amp fp16 needs a GPU

face_distill.extract_teacher
  --weights /nowhere.pth --dry-run     => --weights /nowhere.pth is missing
  --data-root /nowhere                 => /nowhere holds no faces
  --limit 21                           => holds 20 images, 21 were asked for
  --selection per_id --per-id 3        => no multiple of per_id 3
  --arch auto                          => --arch torchscript if you trust its source
  --weights IMAGENET1K_V2 --arch auto  => type its network too, for example --arch resnet50
  --amp fp16 --device cpu              => --amp fp16 needs a GPU
  --out $tmp/file                      => cannot be written

face_distill.evaluate
  --checkpoint /nowhere/a.pth          => /nowhere/a.pth is missing: train first
  --data-root /nowhere                 => /nowhere holds no verification set: expected lfw.bin
  --blip-path /nowhere                 => no BLIP-2 tower: /nowhere/config.json missing
  --teacher /nowhere                   => --teacher /nowhere is missing
  --out /dev/null                      => --out /dev/null cannot be made
  --amp fp16                           => fp16 needs a GPU

face_distill.embed
                                       => FOLDER folder of face images (required)
  $tmp/empty                           => holds no images (.bmp .jpeg .jpg .png .webp)
  $tmp/nowhere                         => is not a folder
  $tmp/pictures --out $tmp/e.npz       => must end with .npy
  $tmp/pictures --out $tmp/file/e.npy  => cannot be made
  $tmp/pictures --checkpoint /x.pth    => x.pth is missing
  $tmp/pictures --blip-path $tmp       => no BLIP-2 tower

arcface.run_scripts.run_arcface
  --data-root /nowhere                 => /nowhere is no directory
  --config nowhere.py                  => --config nowhere.py: no such file
  --resume /nowhere.pth                => no such checkpoint
  --launcher slurm                     => SLURM_PROCID is not set
  --launcher none --nnodes 2           => leave out --nnodes
  --amp fp16 --device cpu              => --amp fp16 needs a GPU
  --cfg-options load_from=/nowhere.pth --dry-run => /nowhere.pth is missing
  --cfg-options model.head.margins=/nowhere --dry-run => /nowhere cannot be read
  --cfg-options model.head.num_classes=3 => is 3, the training pictures show 4 items
  --cfg-options model.head.in_channels=2048 => is 2048, the encoder gives 512
  --cfg-options train_dataloader.batch_size=25 => 24 samples are too few for one step
  --cfg-options train_dataloader.dataset.pipeline.9.scale=72 => is a list of length 5
  --cfg-options train_dataloader.dataset.pipeline.1.type=Resiez --dry-run => did you mean Resize?
  --cfg-options train_dataloader.dataset.pipeline.2.crop_size=64 => cannot be cut out of 36
  --cfg-options param_scheduler.0.type=CosineAnealingLR --dry-run => param_scheduler.0.type
  --cfg-options "model.image_encoder.0.init_cfg={'type':'Pretrained','checkpoint':'IMAGENET1K_V1'}"\
 => --init random
  --cfg-options "model.image_encoder.0.init_cfg={'type':'Pretrained','checkpoint':'/nowhere'}"\
 --dry-run => /nowhere
  --cfg-options "custom_hooks=[{'type':'SetAdaptiveMarginsHook'}]" model.head.num_classes=9\
 => class 4 has no samples

arcface.evaluate
  --checkpoint /nowhere                => /nowhere is missing
  --checkpoint $tmp/alone.pth          => --config
  --data-root /nowhere                 => /nowhere is no directory
  --out /proc/here                     => --out /proc/here cannot
  --cfg-options model.image_encoder.0.depth=34 => does not fit
  --query $tmp/pictures                => --gallery is missing: type both
  --gallery $tmp/pictures --query /x   => /x is not a folder

lavic.src.knowledge_distillation
  --train_data /nowhere.json           => /nowhere.json cannot be read
  --val_data $tmp/file                 => end in .json
  --val_data $tmp/lines.jsonl --dry-run => lines.jsonl line 2 is no JSON
  --train_images_dir /nowhere          => /nowhere cannot be read
  --train_images_dir /                 => no usable sample
  --model_name /                       => /config.json is missing
  --model_name /nowhere --dry-run      => /nowhere
  --max_samples many                   => max_samples (all or a number) must be
  --dtype float16                      => --dtype float16 needs a GPU
  --amp fp16 --device cpu              => --amp fp16 needs a GPU
  --resume /nowhere                    => no such checkpoint
  --output_dir /proc/x                 => cannot be written

lavic.src.prompt_tuning
  --model-dir ""                       => model_dir is '', allowed: a path (not empty
  --model_dir /nowhere                 => /nowhere is no adapter
  --model_dir $tmp/of_stage_2          => is no adapter of stage 1
  --category amazon_home               => amazon_home/train.jsonl is missing
  --item_meta_path /nowhere.json       => /nowhere.json is missing
  --item_meta_path $tmp/titles.json    => titles.json has none of the
  --image_dir /nowhere                 => /nowhere is missing: fetch the pictures
  --model-name /nowhere                => /nowhere
  --max_length 40                      => --max-length 40 is too short
  --amp fp16                           => --amp fp16 needs a GPU

lavic.src.evaluate
  --checkpoint /nowhere                => /nowhere holds no adapter
  --checkpoint $tmp/of_no_stage        => is of neither stage
  --checkpoint $tmp/of_stage_1 --model-name /nowhere --dry-run => /nowhere
  --checkpoint $tmp/of_stage_1 --data-root /nowhere --dry-run => /nowhere

lavic.src.describe
  /nowhere.jpg                         => /nowhere.jpg is no file
  --title T                            => images is empty
  $tmp/pictures/a.jpg --checkpoint $tmp/of_stage_2 => no adapter of stage 1

lavic.src.crawl_images
  --data-root $tmp                     => item2meta_train.json is missing
  --data-root $tmp --train-only --valid-only => leave nothing to fetch
  --data-root /proc/no --train-only --train-data $tmp/items.json => /proc/no

vasevqa.filter.clipfilter1
  --input_dir /nowhere                 => python classifier.py first
  --input_dir $tmp/empty --output_dir $tmp/out => holds no picture (.bmp .jpeg
  --input_dir $tmp/views --output_dir $tmp/views/out => its pictures would be filtered again
  --input_dir $tmp/views --output_dir $tmp/file/out => cannot be written
  --input_dir $tmp/views --output_dir $tmp/out --threshold 0 --keep 0.5 => leave one out
  --input_dir $tmp/views --output_dir $tmp/out --prompts $tmp/p.txt => below [low]
  --input_dir $tmp/views --output_dir $tmp/out --device cuda:1 => this machine has no NVIDIA GPU

vasevqa.filter.clipfilter2
  --input_dir /nowhere                 => ./clipfilter1.sh first
  --pattern (a                         => is no regular expression
  --pattern (a)                        => has 1 group(s)

vasevqa.filter.classifier
  --model_path /no.pth                 => train it with python model.py

vasevqa.filter.model
  --data_dir $tmp                      => /0 is no folder
  --data_dir $tmp/one_label            => 1 holds 0 picture(s)
  --data_dir $tmp/labels --pretrained /no.pth => is no file; allowed: a weight file, auto, none

vasevqa.model.evaluate
  --checkpoint $tmp/qwen --before none --data-root $tmp/rows.json --system /no.txt --dry-run\
 => /no.txt

vasevqa.model.train
  sft --output_dir $tmp/out --- --model $tmp/qwen --dataset $tmp/rows.json --resume /no --dry-run\
 => /no
  sft --output_dir $tmp/out --- --model $tmp/qwen --dataset $tmp/rows.json --adapters /no --dry-run\
 => /no
  sft --output_dir $tmp/out --- --model $tmp/qwen --dataset $tmp/rows.json\
 --resume_from_checkpoint /no --dry-run => /no

multimodal.run_training
  --data-root /nowhere                 => /nowhere lacks coco, clotho, audiocaps
  --data-root $tmp/file/data           => file/data
  --datasets flickr                    => flickr is none of coco, clotho
  --stage-epochs 50/50                 => must be like 30/40/30
  --batch-size 1 --gradient-accumulation-steps 1 => others to tell it from
  --batch-size 400                     => no data set has 800 samples
  --resume /nowhere.pt                 => /nowhere.pt: no such checkpoint
  --pretrained /nowhere.pt             => give an open_clip checkpoint, auto or random
  --amp fp16 --device cpu              => --amp fp16 needs a GPU

multimodal.evaluate
  --checkpoint /nowhere                => no such file, and no checkpoints/best_model
  --checkpoint $tmp/lfs.pt             => lfs.pt
  --checkpoint $tmp/x.pt               => x.pt
  --checkpoint $tmp/other.pt           => was not written by run_training.py
  --checkpoint $tmp/alone.pth --data-root /nowhere --dry-run => /nowhere

multimodal.embed
                                       => nothing to embed: give --images, --audio or --texts
  --texts $tmp/p.txt --query "a dog"   => --images or --audio to search
  --images nowhere                     => --images nowhere: no such file or folder
  --texts nowhere.txt                  => cannot be read as UTF-8 text
  --labels x --template label          => needs {} for the label

multimodal.download_datasets
  --datasets cocoo                     => did you mean coco?
  --datasets coco --audiocaps-source hf: => allowed are youtube, hf:
  --datasets audiocaps --cookies /nowhere --dry-run => /nowhere
  --datasets audiocaps --audiocaps-source local:/nowhere --dry-run => /nowhere
  --datasets audiocaps --audiocaps-source local:$tmp/empty => no sounds there; expected files
  --datasets coco --data-root $tmp/file/data => cannot be
  --datasets coco --mirror /nowhere    => begins with http:// or https://

multimodal.run_all
  --datasets cocoo                     => cocoo is none of
  --pretrained /nowhere.pt             => --pretrained /nowhere.pt: no such file
  --skip-download --data-root /nowhere --dry-run => /nowhere
  --audiocaps-source local:/nowhere --dry-run => /nowhere
"""


def rows() -> Iterator[tuple[str, str, str]]:
    """(script, words, what is said)."""
    script = ""
    for line in TABLE.splitlines():
        if line.startswith("  "):
            words, said = line.split("=> ")
            yield script, words.strip(), said
        elif line:
            script = line


def _things(tmp: Path) -> None:
    """Files and folders that the table names."""
    for name in ("empty", "pictures", "of_stage_1", "of_stage_2", "of_no_stage", "qwen"):
        (tmp / name).mkdir()
    write_views(tmp / "views", 1, 1)
    next((tmp / "views").rglob("*.jpg")).rename(tmp / "pictures" / "a.jpg")
    write_views(tmp / "views", 1, 1)
    for name, emptied in (("labels", ""), ("one_label", "1")):
        data = write_quality_set(tmp / name, 3)
        for path in data.glob(f"{emptied or 'none'}/*.png"):
            path.rename(path.with_suffix(".txt"))
    for name, targets in (("of_stage_1", "vision_tower"), ("of_no_stage", "q_proj")):
        adapter = {"target_modules": [targets], "base_model_name_or_path": "owner/name"}
        write_json(tmp / name / "adapter_config.json", adapter)
    settings = json.loads((nano().adapter / "adapter_config.json").read_text())
    settings["target_modules"] = r"model\.language_model\.layers.*"
    write_json(tmp / "of_stage_2" / "adapter_config.json", settings)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "krater"}]
    texts = {
        "file": "", "p.txt": "[high]\na\n", "lines.jsonl": "\n{broken\n", "x.pt": "x",
        "lfs.pt": "version https://git-lfs.github.com/spec/v1\n",
        "titles.json": '{"B000000000": {"title": "of another shop"}}',
        "items.json": '{"B1": {"images": [{"large": "http://127.0.0.1:9/a.jpg"}]}}',
        "qwen/config.json": "{}", "qwen/pytorch_model.bin": "",
        "rows.json": json.dumps([{"conversations": turns}]),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp / name).write_text(text)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp / "alone.pth")
    torch.save({"model_state_dict": {"a": torch.zeros(1)}}, tmp / "other.pt")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    _things(root)
    return root


def _face_student(root: Path, *words: object) -> list[object]:
    """The tower of small faces with new adapters."""
    paths = trainings.small_faces(root / "faces")
    student = model.FaceStudent(model.load_tower(paths.weights), [0, 3])
    torch.save(model.trainable_state(student), root / "student.pth")
    write_json(root / "config.json", {"settings": {"blip_path": str(paths.weights)}})
    return ["--checkpoint", root / "student.pth", *words]


def _face_evaluate(root: Path) -> list[object]:
    flags = ["--data-root", trainings.faces_demo.DemoPaths(root / "faces").pairs, "--device", "cpu"]
    return [*_face_student(root), *flags]


def _extract(root: Path) -> list[object]:
    paths = trainings.small_faces(root / "faces")
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(3, 6, 16, 16)), root / "net.pt")
    flags = ["--weights", root / "net.pt", "--arch", "torchscript", "--data-root", paths.data_root]
    return [*flags, "--limit", 20, "--workers", 0, "--out", root / "out", "--batch-size", 3]


def _arcface_run(root: Path) -> list[object]:
    training = trainings.arcface(root)
    short = ["--no-validate", "--cfg-options", "train_cfg.max_epochs=1"]
    assert run_here(run_arcface.main, training.words(root / "run", *short)).code == 0
    return ["--checkpoint", root / "run", "--out", root / "out"]


def _training(name: str) -> Callable[[Path], list[object]]:
    return lambda root: trainings.TRAININGS[name](root).words(root / "run")


BASES: dict[str, Callable[[Path], list[Any]]] = {  # what is typed before what is wrong
    "face_distill.train_distill": _training("face_distill"),
    "face_distill.extract_teacher": _extract,
    "face_distill.evaluate": _face_evaluate,
    "face_distill.embed": lambda root: _face_student(root, "--out", root / "e.npy"),
    "arcface.run_scripts.run_arcface": _training("arcface"),
    "arcface.evaluate": _arcface_run,
    "lavic.src.knowledge_distillation": _training("lavic_distillation"),
    "lavic.src.prompt_tuning": _training("lavic_tuning"),
    "lavic.src.evaluate": lambda root: ["--data-root", nano().root / "data", "--out", root / "o"],
    "multimodal.run_training": _training("multimodal"),
    "multimodal.run_all": lambda root: ["--data-root", root / "d", "--output-dir", root / "o"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], list[object]]:
    @cache
    def made(script: str) -> list[object]:
        root = tmp_path_factory.mktemp(script.rpartition(".")[2])
        return BASES[script](root) if script in BASES else []

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words", "said"), list(rows()))
def test_fault_35_a_mistake_is_one_line_and_exit_2(script, words, said, base, tmp, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp))
    monkeypatch.setenv("PATH", f"{tmp}:/usr/bin:/bin")
    typed = [*base(script), *shlex.split(Template(words).substitute(tmp=tmp))]
    outcome = run_here(importlib.import_module(script).main, typed)
    assert outcome.code == 2, outcome.text
    assert re.match(r"error: |\w+ +failed: ", outcome.last_line) and said in outcome.last_line
    assert "Traceback" not in outcome.text


PLANNED = {  # script: what is typed beside the base, and what the answer says
    "face_distill.train_distill": ("", "1 process(es) x 4"),
    "face_distill.extract_teacher": ("", "20 images of"),
    "face_distill.evaluate": ("", "with lfw.bin; results in"),
    "face_distill.embed": ("$tmp/pictures", "1 images in"),
    "arcface.run_scripts.run_arcface": ("", "6 pictures a step = 1 process(es) x 6"),
    "lavic.src.knowledge_distillation": ("", "20 samples"),
    "lavic.src.prompt_tuning": ("", "5 epochs over"),
    "lavic.src.evaluate": ("--checkpoint $adapter", "stage 1: "),
    "multimodal.run_training": ("", "8 samples a step = 1 process(es) x batch 4 x accumulation 2"),
    "multimodal.run_all": ("--epochs 50", "--epochs 50"),
}


def files_of(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("script", PLANNED)
def test_a_dry_run_says_the_plan_and_writes_nothing(script, base, tmp):
    more, said = PLANNED[script]
    more = shlex.split(Template(more).substitute(tmp=tmp, adapter=nano().adapter))
    typed = [*base(script), *more, "--dry-run"]
    before = files_of(tmp.parent)
    outcome = run_here(importlib.import_module(script).main, typed)
    assert outcome.code == 0, outcome.text
    assert said in outcome.text
    assert files_of(tmp.parent) == before
