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


def cfg(*options):
    return ["--cfg-options", *options]


MISTAKES = {
    "a head with fewer classes than the data": (
        cfg("model.head.num_classes=3"),
        "model.head.num_classes is 3, the training pictures show 4 items",
    ),
    "a head of another width": (
        cfg("model.head.in_channels=2048"),
        "model.head.in_channels is 2048, the encoder gives 512",
    ),
    "a batch larger than the data": (
        cfg("train_dataloader.batch_size=25"),
        "24 samples are too few for one step",
    ),
    "no data there": (["--data-root", "/nowhere"], "/nowhere is no directory"),
    "no configuration there": (["--config", "nowhere.py"], "--config nowhere.py: no such file"),
    "a misspelt flag": (["--cfg-opitons", "a=1"], "--cfg-opitons; did you mean --cfg-options?"),
    "a list's index too high": (
        cfg("train_dataloader.dataset.pipeline.9.scale=72"),
        "is a list of length 5",
    ),
    "an unknown step": (
        cfg("train_dataloader.dataset.pipeline.1.type=Resiez"),
        "did you mean Resize?",
    ),
    "a crop larger than the picture": (
        cfg("train_dataloader.dataset.pipeline.2.crop_size=64"),
        "64 pixels cannot be cut out of 36",
    ),
    "weights that are not there": (
        cfg("model.image_encoder.0.init_cfg={'type': 'Pretrained', 'checkpoint': 'IMAGENET1K_V1'}"),
        "--init random",
    ),
    "a run to continue that is not there": (["--resume", "/nowhere.pth"], "no such checkpoint"),
    "weights to start from that are not there": (cfg("load_from=/nowhere.pth"), "is missing"),
    "srun without srun": (["--launcher", "slurm"], "SLURM_PROCID is not set"),
    "two hosts in one process": (["--launcher", "none", "--nnodes", 2], "leave out --nnodes"),
    "fp16 on the CPU": (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    "adaptive margins for items without pictures": (
        cfg("custom_hooks=[{'type': 'SetAdaptiveMarginsHook'}]", "model.head.num_classes=9"),
        "class 4 has no samples",
    ),
}


@pytest.mark.parametrize(("extra", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_one_line(extra, message, flags, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    outcome = run_here(run_arcface.main, [*flags, *extra])
    assert outcome.code == 2, outcome.text
    assert outcome.last_line.startswith("error: ") and message in outcome.last_line
    assert "Traceback" not in outcome.text


def test_a_malformed_list_is_refused_with_its_line_before_torch_is_loaded(flags, tmp_path):
    root = build_inshop(tmp_path / "broken", 2, 1)
    path = root / "Eval" / "list_eval_partition.txt"
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace("train", "trian")
    path.write_text("\n".join(lines))
    outcome = run_here(run_arcface.main, [*flags, "--data-root", root, "--dry-run"])
    assert outcome.code == 2
    assert "line 8: status 'trian'" in outcome.last_line and "mean train?" in outcome.last_line


def test_an_error_of_a_configuration_is_named_with_its_line(flags, tmp_path):
    config = tmp_path / "broken.py"
    config.write_text("lr = 0.1\nmodel = dict(depth=lr / 0)\n")
    outcome = run_here(run_arcface.main, [*flags, "--config", config])
    assert outcome.code == 2
    assert "broken.py:2: ZeroDivisionError: float division by zero" in outcome.last_line


def test_pictures_that_cannot_be_read_are_left_out_and_named(flags, inshop, tmp_path):
    root = build_inshop(tmp_path / "holes", 30, 30)  # one picture in a hundred may be missing
    query = next(
        line.split()[0]
        for line in (root / "Eval" / "list_eval_partition.txt").read_text().splitlines()
        if line.endswith("query")
    )
    (root / "Img" / query).write_bytes(b"no picture")
    extra = cfg(
        "train_cfg.max_epochs=1", "model.head.num_classes=30", "default_hooks.logger.interval=30"
    )
    outcome = run_here(run_arcface.main, [*flags, "--data-root", root, *extra])
    assert outcome.code == 0, outcome.text
    assert f"left out: {root / 'Img' / query}" in outcome.text
    assert "retrieval/Recall@1" in outcome.text
