"""multimodal through run_training.py, on a few pictures and sounds in the real formats."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multimodal import evaluate, run_training
from multimodal.datasets import Task
from multimodal.model import create_model
from multimodal.training import evaluation, memory
from multimodal.training.losses import Learner
from shared.files import read_json, read_json_lines
from tests import multimodal_data
from tests.harness import ROOT, losses, run_here, start, status_of

SCRIPT = ROOT / "multimodal" / "run_training.py"
STEPS = 9 + 12 + 2 * 12  # of the four epochs, of 8 samples each
PAIRS = ("coco", "clotho", "audiocaps", "voxceleb")

# The document's code, word for word; `base` alone is another size where said.
SNIPPET = """\
import torch
from model import create_model

# 创建模型
model = create_model('base')

# 加载权重
checkpoint = torch.load('outputs/checkpoints/best_model.pt')
model.load_state_dict(checkpoint['model_state_dict'])
model.eval()

# 推理
with torch.no_grad():
    outputs = model(
        images=image_tensor,      # [B, 3, 224, 224]
        input_ids=text_ids,       # [B, L]
        attention_mask=text_mask, # [B, L]
        audio=audio_mel           # [B, T, 80]
    )
    
    # 获取融合特征
    features = outputs['fused_features']  # [B, 512]
    
    # 获取分类logits
    logits = outputs['logits']  # [B, num_classes]
"""  # noqa: W293, as it stands there
INPUTS = """\
import sys, torch
OTHERS = {{"shared", "multimodal", "datasets", "open_clip", "transformers", "torchvision"}}
image_tensor = torch.zeros(2, 3, {side}, {side})
text_ids = torch.tensor([[49406, 320, 2368, 49407]] * 2)
text_mask = torch.ones(2, 4)
audio_mel = torch.zeros(2, 100, 80)
"""


@pytest.fixture(scope="session")
def data() -> Path:
    """The data root."""
    return multimodal_data.made().data_root


WHOLE = ("--epochs", 4, "--stage-epochs", "1/1/2", "--checkpoint-every", 3)


def flags_for(data: Path, output: Path, *more: object) -> list[object]:
    """The flags of a run of three short epochs, one a stage; later ones win."""
    return [
        "--data-root", data, "--output-dir", output, "--model-size", "nano", "--batch-size", 4,
        "--gradient-accumulation-steps", 2, "--epochs", 3, "--workers", 0, "--clip-seconds", 1,
        "--init", "random",
        "--log-every", 1, "--eval-batch-size", 8, "--no-use-checkpoint", *more,
    ]  # fmt: skip


def trained(data: Path, output: Path, *more: object) -> str:
    """What a run of these flags said."""
    outcome = run_here(run_training.main, flags_for(data, output, *more))
    assert outcome.code == 0, outcome.text
    return outcome.text


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """The output directory of an undisturbed run; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("whole") / "outputs"
    trained(data, output, *WHOLE)
    return output


def load(path: Path) -> dict:
    """As the document loads it."""
    return torch.load(path)


def report_of(output: Path) -> dict:
    (path,) = (output / "reports").glob("report_*.json")
    return read_json(path)


def rows_of(output: Path, split: str) -> list[dict]:
    return [row for row in read_json_lines(output / "metrics.jsonl") if row["split"] == split]


def tags_of(rows: list[dict]) -> set[str]:
    return {tag for row in rows for tag in row if "/" in tag}


def test_a_run_leaves_the_documented_files(whole):
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {
        "best_model.pt", "best_retrieval.pt", "final_model.pt", "checkpoint_epoch_1.pt",
        "checkpoint_epoch_2.pt", "checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt",
    }  # fmt: skip
    assert list((whole / "logs" / "tensorboard").glob("events.out.tfevents*"))
    assert list((whole / "logs").glob("training_*.log"))
    status = status_of(whole)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, STEPS)
    result = status["result"]
    assert (result["name"], result["split"]) == ("image-text R@1", "Karpathy test")
    assert (result["n"], result["chance"]) == (8, 1 / 8) and 0 <= result["after"] <= 1


def test_the_result_is_what_evaluate_finds_on_the_test_splits(whole, data, tmp_path):
    flags = ["--checkpoint", whole, "--data-root", data, "--out", tmp_path, "--no-report"]
    assert run_here(evaluate.main, [*flags, "--workers", 0]).code == 0
    rows = read_json(tmp_path / "evaluation.json")["retrieval"]
    summary = {row["pairs"]: row for row in report_of(whole)["summary"]}
    assert tuple(summary) == PAIRS
    for name, row in summary.items():
        ways = [way["R@1"] for way in rows if way["data set"] == name]
        assert row["R@1 after"] == pytest.approx(sum(ways) / len(ways), abs=1e-3)
        assert 0 <= row["R@1 before"] <= 1 and row["items"] > 0
    said = next((whole / "logs").glob("training_*.log")).read_text()
    after = f"{100 * summary['coco']['R@1 after']:.1f} % after"
    assert f"{after}; by chance 12.5 %, among 8 items" in said


def test_epochs_go_through_the_stages_and_steps_are_numbered_on(whole):
    rows = rows_of(whole, "train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    unimodal, aligned, tuned = (tags_of(part) for part in (rows[:9], rows[9:21], rows[21:]))
    assert unimodal == {"coco/classes", "clotho/keywords", "audiocaps/spectrogram"}
    assert aligned == {f"{name}/{tag}" for name in PAIRS for tag in ("contrast", "scale")}
    assert tuned == aligned | {"coco/classes", "clotho/keywords"}


def test_the_best_files_are_of_the_epochs_that_were_best(whole):
    epochs = rows_of(whole, "epoch")
    assert len(epochs) == 4
    for row in epochs:
        parts = [row[f"val/{name}"] for name in PAIRS if f"val/{name}" in row]
        assert row["val/loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-6)
    # the model: the lowest of the last stage, each set's loss beside its first there
    names = [f"val/{name}" for name in PAIRS]
    last_stage = [sum(row[n] / epochs[2][n] for n in names) / 4 for row in epochs[2:]]
    assert [row["val/relative"] for row in epochs[2:]] == pytest.approx(last_stage, rel=1e-6)
    best = load(whole / "checkpoints" / "best_model.pt")
    place = last_stage.index(min(last_stage))
    assert (best["stage"], best["epoch"]) == ("fine-tuning", 3 + place)
    assert best["val_loss"] == pytest.approx(epochs[2 + place]["val/loss"], rel=1e-6)
    # retrieval: the highest of the stages that have pairs
    assert ["val/R@1" in row for row in epochs] == [False, True, True, True]
    recalls = [row["val/R@1"] for row in epochs[1:]]
    best = load(whole / "checkpoints" / "best_retrieval.pt")
    assert best["epoch"] == 2 + recalls.index(max(recalls))


def test_every_file_is_plain_and_fits_the_model_that_it_names(whole):
    for path in (whole / "checkpoints").iterdir():
        state = load(path)
        create_model(**state["model"]).load_state_dict(state["model_state_dict"])
        assert all(tensor.device.type == "cpu" for tensor in state["model_state_dict"].values())
        assert state["keyword_head"]["weight"].shape == (80, 512) and "tone" in state["keywords"]


def test_keywords_are_told_as_training_learnt_them(whole):
    """evaluate.py's logits are those of the learner's own forward pass."""
    model = evaluation.open_trained(whole / "checkpoints" / "final_model.pt", torch.device("cpu"))
    sounds = torch.randn(3, 40, 80, generator=torch.Generator().manual_seed(0))
    embedder = evaluation.Embedder(model, torch.device("cpu"), "off", 2, 0)
    found = embedder.files("audio", sounds.__getitem__, range(3), logits=True)
    learner = Learner(create_model("nano", use_checkpoint=False), 80, fills_in=True).eval()
    learner.load_state_dict(load(whole / "last.pt")["parts"]["learner"])
    batch = {"audio": sounds, "audio_mask": torch.ones(3, 40, dtype=torch.bool)}
    with torch.no_grad():
        expected = learner(batch, Task("clotho", ("audio",), False, "keywords"))["keywords"]
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)


def test_the_report_tells_of_data_stages_and_files(whole):
    report = report_of(whole)
    assert report["status"] == "done" and report["config"]["batch_size"] == 4
    counts = {(r["data_set"], r.get("used_as")): r for r in report["data"]}
    caps = counts["audiocaps", "training"]
    assert (caps["expected"], caps["found"], caps["skipped"]) == (18, 16, {"missing": 2})
    assert [(r["stage"], r["epochs"], r["steps"]) for r in report["stages"]] == [
        ("unimodal", 1, 9), ("alignment", 1, 12), ("fine-tuning", 2, 24),
    ]  # fmt: skip
    assert [r["best_epoch"] for r in report["stages"]][:2] == [1, 2]  # each stage has its best
    assert report["pretrained"] == {"file": None, "words": "random"}
    assert status_of(whole)["data"]["word embeddings"] == "random (as asked)"
    files = {path.name for path in (whole / "checkpoints").iterdir()}
    assert {row["file"] for row in report["checkpoints"]} == files
    (page,) = (whole / "reports").glob("report_*.md")
    assert "| words | random |" in page.read_text()


def snippet_in(directory: Path, outputs: Path, size: str, side: int) -> str:
    """Run the document's code beside model.py alone, with `outputs` there; what it found.

    And what it imported beside torch: model.py stands alone.
    """
    directory.mkdir()
    (directory / "model.py").symlink_to(ROOT / "multimodal" / "model.py")
    (directory / "outputs").symlink_to(outputs)
    shown = "print(tuple(features.shape), tuple(logits.shape), OTHERS & set(sys.modules))"
    code = INPUTS.format(side=side) + SNIPPET.replace("'base'", f"'{size}'") + shown
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr


def test_the_documents_code_loads_and_asks_what_training_wrote(whole, tmp_path):
    assert snippet_in(tmp_path / "here", whole, "nano", 64) == "(2, 512) (2, 80) set()"


@pytest.mark.full
@pytest.mark.limit(600)
def test_the_documents_code_word_for_word_on_a_base_model(data, tmp_path):
    output = tmp_path / "outputs"
    trained(
        data, output, "--model-size", "base", "--batch-size", 2, "--max-steps", 1,
        "--gradient-accumulation-steps", 1, "--datasets", "coco", "--epochs", 1,
    )  # fmt: skip
    assert snippet_in(tmp_path / "here", output, "base", 224) == "(2, 512) (2, 80) set()"
    shutil.rmtree(output)


def test_an_epochs_checkpoint_alone_continues_the_run_exactly(whole, tmp_path):
    output = tmp_path / "outputs"
    shutil.copytree(whole, output)
    place = output / "checkpoints" / "checkpoint_epoch_3.pt"
    outcome = run_here(run_training.main, ["--resume", place])
    assert outcome.code == 0, outcome.text
    assert f"continuing from {place} at step 33 of 45" in outcome.text
    assert losses(output) == losses(whole)
    relative = [[row["val/relative"] for row in rows_of(run, "epoch")] for run in (output, whole)]
    assert relative[0] == relative[1]
    ours, theirs = (load(d / "checkpoints" / "final_model.pt") for d in (output, whole))
    for name, tensor in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], tensor), name


def test_another_number_of_epochs_is_refused_for_the_same_run(whole):
    place = whole / "checkpoints" / "checkpoint_epoch_4.pt"
    outcome = run_here(run_training.main, ["--resume", place, "--epochs", 9])
    assert outcome.code == 2
    assert "cannot continue with epochs: 4 → 9" in outcome.last_line


def test_a_checkpoint_of_weights_alone_cannot_be_continued(whole):
    best = whole / "checkpoints" / "best_model.pt"
    outcome = run_here(run_training.main, ["--resume", best])
    assert outcome.code == 2
    assert "best_model.pt holds weights and no state of a run" in outcome.last_line


@pytest.mark.slow
@pytest.mark.serial
def test_two_processes_train_as_one_does_on_the_same_batches(whole, data, tmp_path):
    """Into the last stage."""
    output, until = tmp_path / "outputs", 27
    more = (*WHOLE, "--gradient-accumulation-steps", 1, "--nproc", 2, "--max-steps", until)
    with start([SCRIPT, *flags_for(data, output, *more)]) as running:
        assert running.finish().code == 0, running.text
    assert report_of(output)["status"] == "done"  # and there is one report
    alone = {step: loss for step, loss in losses(whole).items() if step <= until}
    assert losses(output) == pytest.approx(alone, rel=1e-4)
    values = [[row["val/loss"] for row in rows_of(run, "epoch")][:2] for run in (output, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-3) and len(values[0]) == 2


def test_data_sets_that_are_not_there_are_named_and_the_rest_is_learnt(data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "audiocaps").symlink_to(data / "audiocaps")
    (root / "clotho").mkdir()
    text = trained(root, tmp_path / "outputs", "--max-steps", 3)
    assert "clotho is left out" in text
    assert "stage unimodal: epochs 1 to 1, 2 steps each, from audiocaps" in text
    notes = report_of(tmp_path / "outputs")["data"]
    assert {r["data_set"] for r in notes if "left_out" in r} == {"coco", "voxceleb", "clotho"}
    assert status_of(tmp_path / "outputs")["result"]["name"] == "audiocaps R@1"


def test_voices_without_faces_are_paired_with_voices(data, tmp_path):
    root, output = tmp_path / "data", tmp_path / "outputs"
    (root / "voxceleb").mkdir(parents=True)
    for name in ("wav", "vox1_meta.csv"):
        (root / "voxceleb" / name).symlink_to(data / "voxceleb" / name)
    text = trained(root, output, "--gradient-accumulation-steps", 1, "--epochs", 2)
    assert "voices are paired with voices of one speaker" in text
    assert "stage unimodal is left out: no data set is for it" in text
    rows = rows_of(output, "train")
    assert all("voxceleb/contrast" in row for row in rows) and len(rows) == 12
    assert report_of(output)["data"][-1]["pairs"] == "audio with audio of the same voice"


def test_sigmoid_trains_with_scale_and_bias(data, tmp_path):
    output = tmp_path / "outputs"
    more = ("--loss", "sigmoid", "--datasets", "coco", "--epochs", 1, "--stage-epochs", "0/1/0")
    trained(data, output, *more)
    state = load(output / "checkpoints" / "final_model.pt")["model_state_dict"]
    assert state["logit_bias.image_text"].item() != -10.0
    assert state["logit_bias.audio_text"].item() == -10.0
    assert state["logit_scale.image_text"].item() == pytest.approx(2.3026, abs=0.1)


def test_one_sample_a_step_is_enough_where_nothing_is_told_apart(data, tmp_path):
    more = ("--batch-size", 1, "--gradient-accumulation-steps", 1, "--stage-epochs", "1/0/0")
    trained(data, tmp_path / "o", *more, "--dry-run")


def test_words_start_from_the_open_clip_file_and_every_sound_can_be_filled_in(data, tmp_path):
    root, output = tmp_path / "data", tmp_path / "outputs"
    (root / "pretrained").mkdir(parents=True)
    for name in ("audiocaps", "clotho"):
        (root / name).symlink_to(data / name)
    words = root / "pretrained" / "words.safetensors"
    table = torch.randn(49408, 32, generator=torch.Generator().manual_seed(0))
    save_file({"token_embedding.weight": table}, words)
    more = ("--pretrained", "auto", "--stage-epochs", "1/0/0", "--epochs", 1)
    text = trained(root, output, *more, "--audio-pretraining", "spectrogram")
    assert f"starting from {words}: words copied" in text
    assert report_of(output)["pretrained"] == {"file": str(words), "words": "copied"}
    assert status_of(output)["data"]["word embeddings"] == f"copied ({words})"
    state = load(output / "checkpoints" / "final_model.pt")["model_state_dict"]
    assert torch.equal(state["text.token_embedding.weight"], table)  # stage 1 leaves texts alone
    assert tags_of(rows_of(output, "train")) == {"clotho/spectrogram", "audiocaps/spectrogram"}


def test_words_that_cannot_be_had_are_named_with_address_and_place(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    flags = flags_for(data, tmp_path / "outputs", "--pretrained", "auto")
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 2, outcome.text
    for part in ("https://huggingface.co/laion/CLIP-ViT-B-16", str(tmp_path / "hub"),
                 f"into {data / 'pretrained'}", "by --init random"):  # fmt: skip
        assert part in outcome.last_line
    assert not (tmp_path / "outputs").exists()


BESIDE = """\
import importlib.util, sys
sys.path.insert(0, sys.argv[2])                    # where Python puts a script's directory
spec = importlib.util.spec_from_file_location("entry", sys.argv[1])
sys.modules["entry"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import multimodal.datasets
import datasets
assert sys.argv[2] in sys.path
print(datasets.Dataset.__module__)
"""


@pytest.mark.slow
def test_hugging_faces_datasets_are_found_beside_the_recipes_file():
    command = [sys.executable, "-c", BESIDE, SCRIPT, SCRIPT.parent]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "datasets.arrow_dataset", done.stderr[-2000:]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_estimate_stays_below_the_documented_minimum():
    """Of the largest size; those of the page: tests/unit/test_readme_memory.py."""
    cfg = run_training.Config(datasets=("coco",), model_size="large")
    found = memory.plan(run_training.step_of(cfg), 1)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model("large").parameters())
    rows = {what: size for what, size, _ in found.rows}
    assert rows["weights"] == pytest.approx(4 * parameters, rel=0.01)  # with the keyword head
    assert rows["optimizer"] == 2 * rows["weights"]
    assert found.total < 20e9


def test_out_of_memory_ends_with_the_plan_and_what_helps(data, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("multimodal.run_training._backward", fails)
    flags = flags_for(data, tmp_path / "outputs", "--datasets", "coco")
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 1
    assert "what --estimate says of this run" in outcome.text
    assert "multimodal, nano, batch 4, half precision" in outcome.text
    assert "lower --batch-size" in outcome.last_line
    report = report_of(tmp_path / "outputs")
    assert report["status"] == "failed"
    assert report["reason"].startswith("OutOfMemoryError: CUDA out of memory")


def test_the_models_defaults_are_those_of_the_settings_file():
    cfg = json.loads(run_here(run_training.main, ["--print-config"]).text)
    for name in ("embed_dim", "use_checkpoint", "dropout", "activation"):
        assert cfg[name] == create_model.__kwdefaults__[name], name
    assert cfg["model_size"] == create_model.__defaults__[0] == "base"
