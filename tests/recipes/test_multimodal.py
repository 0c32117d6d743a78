"""multimodal through run_training.py, on a few pictures and sounds in the real formats."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multimodal import evaluate, run_training
from multimodal import model as models
from multimodal.datasets import Task
from multimodal.model import create_model
from multimodal.training import evaluation, memory
from multimodal.training.losses import Learner
from shared.files import read_json, read_json_lines
from tests import multimodal_data
from tests.harness import ROOT, losses, run_here, start, status_of

SCRIPT = ROOT / "multimodal" / "run_training.py"
STEPS = (9, 12, 12)  # batches an epoch of the three stages, of 8 samples each

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
import torch
image_tensor = torch.zeros(2, 3, {side}, {side})
text_ids = torch.tensor([[49406, 320, 2368, 49407]] * 2)
text_mask = torch.ones(2, 4)
audio_mel = torch.zeros(2, 100, 80)
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The data root."""
    return multimodal_data.build(tmp_path_factory.mktemp("multimodal")).data_root


def flags_for(data: Path, output: Path, *more: object) -> list[object]:
    """The flags of a run of three short epochs, one a stage; later ones win."""
    return [
        "--data-root", data, "--output-dir", output, "--model-size", "nano", "--batch-size", 4,
        "--gradient-accumulation-steps", 2, "--epochs", 3, "--workers", 0, "--clip-seconds", 1,
        "--init", "random",
        "--log-every", 1, "--eval-batch-size", 8, "--no-use-checkpoint", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """The output directory of an undisturbed run; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("whole") / "outputs"
    outcome = run_here(run_training.main, flags_for(data, output, "--epochs", 6))
    assert outcome.code == 0, outcome.text
    return output


def load(path: Path) -> dict:
    """As the document loads it."""
    return torch.load(path)


def test_a_run_leaves_the_documented_files(whole):
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {
        "best_model.pt", "best_retrieval.pt", "final_model.pt", "checkpoint_epoch_2.pt",
        "checkpoint_epoch_4.pt", "checkpoint_epoch_6.pt",
    }  # fmt: skip
    assert list((whole / "logs" / "tensorboard").glob("events.out.tfevents*"))
    assert list((whole / "logs").glob("training_*.log"))
    report = next((whole / "reports").glob("report_*.json"))
    assert report.with_suffix(".md").exists()
    status = status_of(whole)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 2 * sum(STEPS))
    result = status["result"]
    assert (result["name"], result["split"]) == ("image-text R@1", "Karpathy test")
    assert (result["n"], result["chance"]) == (8, 1 / 8) and 0 <= result["after"] <= 1


def test_the_result_is_what_evaluate_finds_on_the_test_splits(whole, data, tmp_path):
    flags = ["--checkpoint", whole, "--data-root", data, "--out", tmp_path, "--no-report"]
    assert run_here(evaluate.main, [*flags, "--workers", 0]).code == 0
    rows = read_json(tmp_path / "evaluation.json")["retrieval"]
    (report,) = (whole / "reports").glob("report_*.json")
    summary = {row["pairs"]: row for row in read_json(report)["summary"]}
    assert list(summary) == ["coco", "clotho", "audiocaps", "voxceleb"]
    for name, row in summary.items():
        ways = [way["R@1"] for way in rows if way["data set"] == name]
        assert row["R@1 after"] == pytest.approx(sum(ways) / len(ways), abs=1e-3)
        assert 0 <= row["R@1 before"] <= 1 and row["items"] > 0
    said = next((whole / "logs").glob("training_*.log")).read_text()
    after = f"{100 * summary['coco']['R@1 after']:.1f} % after"
    assert f"{after}; by chance 12.5 %, among 8 items" in said


def test_epochs_go_through_the_stages_and_steps_are_numbered_on(whole):
    rows = [r for r in read_json_lines(whole / "metrics.jsonl") if r["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 2 * sum(STEPS) + 1))
    by_stage = [rows[:18], rows[18:42], rows[42:]]
    tags = [{tag for row in part for tag in row if "/" in tag} for part in by_stage]
    assert tags[0] == {"coco/classes", "clotho/keywords", "audiocaps/spectrogram"}
    pairs = ("coco", "clotho", "audiocaps", "voxceleb")
    contrast = {f"{name}/{tag}" for name in pairs for tag in ("contrast", "scale")}
    assert tags[1] == contrast
    assert tags[2] == contrast | {"coco/classes", "clotho/keywords"}


def test_the_best_model_is_the_last_stages_and_every_file_is_plain(whole):
    epochs = [r for r in read_json_lines(whole / "metrics.jsonl") if r["split"] == "epoch"]
    assert len(epochs) == 6
    names = [f"val/{name}" for name in ("coco", "clotho", "audiocaps", "voxceleb")]
    last_stage = [sum(row[n] / epochs[4][n] for n in names) / 4 for row in epochs[4:]]
    assert [row["val/relative"] for row in epochs[4:]] == pytest.approx(last_stage, rel=1e-6)
    best = load(whole / "checkpoints" / "best_model.pt")
    place = last_stage.index(min(last_stage))
    assert (best["stage"], best["epoch"]) == ("fine-tuning", 5 + place)
    assert best["val_loss"] == pytest.approx(epochs[4 + place]["val/loss"], rel=1e-6)
    for path in (whole / "checkpoints").iterdir():
        state = load(path)
        model = create_model(**state["model"])
        model.load_state_dict(state["model_state_dict"])
        assert all(tensor.device.type == "cpu" for tensor in state["model_state_dict"].values())
        assert state["keyword_head"]["weight"].shape == (80, 512)
        assert "tone" in state["keywords"]


def test_the_best_retrieval_is_the_epoch_that_finds_most_pairs(whole):
    rows = [r for r in read_json_lines(whole / "metrics.jsonl") if r["split"] == "epoch"]
    assert ["val/R@1" in row for row in rows] == [False, False, True, True, True, True]
    recalls = [row["val/R@1"] for row in rows[2:]]
    best = load(whole / "checkpoints" / "best_retrieval.pt")
    assert best["epoch"] == 3 + recalls.index(max(recalls))


def test_keywords_are_told_as_training_learnt_them(whole):
    """evaluate.py's and embed.py's logits are those of the learner's own forward pass."""
    model = evaluation.open_trained(whole / "checkpoints" / "final_model.pt", torch.device("cpu"))
    sounds = torch.randn(3, 40, 80, generator=torch.Generator().manual_seed(0))
    embedder = evaluation.Embedder(model, torch.device("cpu"), "off", 2, 0)
    found = embedder.files("audio", sounds.__getitem__, range(3), logits=True)
    last = load(whole / "last.pt")
    weights = last["parts"]["learner"]
    fills_in = "mel_head.weight" in weights
    learner = Learner(create_model("nano", use_checkpoint=False), 80, fills_in=fills_in).eval()
    learner.load_state_dict(weights)
    task = Task("clotho", ("audio",), False, "keywords")
    batch = {"audio": sounds, "audio_mask": torch.ones(3, 40, dtype=torch.bool)}
    with torch.no_grad():
        expected = learner(batch, task)["keywords"]
    assert found.logits is not None
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-4)


def test_validation_loss_is_the_mean_of_the_sources(whole):
    for row in read_json_lines(whole / "metrics.jsonl"):
        if row["split"] == "epoch":
            mixed = ("val/loss", "val/relative", "val/R@1")
            parts = [v for tag, v in row.items() if tag.startswith("val/") and tag not in mixed]
            assert row["val/loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-6)


def test_the_report_tells_of_data_stages_and_files(whole):
    path = next((whole / "reports").glob("report_*.json"))
    report, text = read_json(path), path.with_suffix(".md").read_text()
    assert report["status"] == "done"
    counts = {(r["data_set"], r.get("used_as")): r for r in report["data"]}
    caps = counts["audiocaps", "training"]
    assert (caps["expected"], caps["found"], caps["skipped"]) == (18, 16, {"missing": 2})
    assert [(r["stage"], r["epochs"], r["steps"]) for r in report["stages"]] == [
        ("unimodal", 2, 18), ("alignment", 2, 24), ("fine-tuning", 2, 24),
    ]  # fmt: skip
    assert report["pretrained"] == {"file": None, "words": "random"}
    assert status_of(whole)["data"]["word embeddings"] == "random (as asked)"
    assert {row["file"] for row in report["checkpoints"]} == {
        p.name for p in (whole / "checkpoints").iterdir()
    }
    assert all(len(row["sha256"]) == 64 for row in report["checkpoints"])
    assert "| words | random |" in text
    assert report["config"]["batch_size"] == 4


def snippet_in(directory: Path, outputs: Path, size: str, side: int) -> str:
    """Run the document's code beside model.py, with `outputs` there; what it found."""
    directory.mkdir()
    (directory / "model.py").symlink_to(ROOT / "multimodal" / "model.py")
    (directory / "outputs").symlink_to(outputs)
    shown = "print(tuple(features.shape), tuple(logits.shape))"
    code = INPUTS.format(side=side) + SNIPPET.replace("'base'", f"'{size}'") + shown
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr


def test_the_documents_code_loads_and_asks_what_training_wrote(whole, tmp_path):
    assert snippet_in(tmp_path / "here", whole, "nano", 64) == "(2, 512) (2, 80)"


@pytest.mark.full
@pytest.mark.limit(600)
def test_the_documents_code_word_for_word_on_a_base_model(data, tmp_path):
    output = tmp_path / "outputs"
    flags = [
        *flags_for(data, output, "--model-size", "base", "--batch-size", 2, "--max-steps", 1),
        "--gradient-accumulation-steps", 1, "--datasets", "coco", "--epochs", 1,
    ]  # fmt: skip
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 0, outcome.text
    assert snippet_in(tmp_path / "here", output, "base", 224) == "(2, 512) (2, 80)"
    shutil.rmtree(output)


def test_an_epochs_checkpoint_alone_continues_the_run_exactly(whole, data, tmp_path):
    output = tmp_path / "outputs"
    shutil.copytree(whole, output)
    undisturbed = losses(whole)
    place = output / "checkpoints" / "checkpoint_epoch_4.pt"
    outcome = run_here(run_training.main, ["--resume", place])
    assert outcome.code == 0, outcome.text
    assert f"continuing from {place} at step 42 of 66" in outcome.text
    assert losses(output) == undisturbed
    ours, theirs = (load(d / "checkpoints" / "final_model.pt") for d in (output, whole))
    for name, tensor in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], tensor), name


def test_a_checkpoint_of_weights_alone_cannot_be_continued(whole, tmp_path):
    output = tmp_path / "outputs"
    shutil.copytree(whole, output)
    best = output / "checkpoints" / "best_model.pt"
    outcome = run_here(run_training.main, ["--resume", best])
    assert outcome.code == 2
    assert "best_model.pt holds weights and no state of a run" in outcome.last_line


@pytest.mark.slow
@pytest.mark.serial
def test_two_processes_train_as_one_does_on_the_same_batches(whole, data, tmp_path):
    output = tmp_path / "outputs"
    more = ("--epochs", 6, "--gradient-accumulation-steps", 1, "--nproc", 2)
    with start([SCRIPT, *flags_for(data, output, *more)]) as running:
        assert running.finish().code == 0, running.text
    assert losses(output) == pytest.approx(losses(whole), rel=1e-4)
    values = [
        [row["val/loss"] for row in read_json_lines(run / "metrics.jsonl") if "val/coco" in row]
        for run in (output, whole)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3) and len(values[0]) == 6


def test_data_sets_that_are_not_there_are_named_and_the_rest_is_learnt(data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "audiocaps").symlink_to(data / "audiocaps")
    (root / "clotho").mkdir()
    outcome = run_here(run_training.main, flags_for(root, tmp_path / "outputs", "--max-steps", 3))
    assert outcome.code == 0, outcome.text
    assert "clotho is left out" in outcome.text
    assert "stage unimodal: epochs 1 to 1, 2 steps each, from audiocaps" in outcome.text
    path = next((tmp_path / "outputs" / "reports").glob("report_*.json"))
    left_out = {r["data_set"]: r["left_out"] for r in read_json(path)["data"] if "left_out" in r}
    assert left_out.keys() == {"coco", "voxceleb", "clotho"}
    assert status_of(tmp_path / "outputs")["result"]["name"] == "audiocaps R@1"


def test_voices_without_faces_are_paired_with_voices(data, tmp_path):
    root = tmp_path / "data"
    (root / "voxceleb").mkdir(parents=True)
    for name in ("wav", "vox1_meta.csv"):
        (root / "voxceleb" / name).symlink_to(data / "voxceleb" / name)
    more = ("--batch-size", 4, "--gradient-accumulation-steps", 1, "--epochs", 2)
    outcome = run_here(run_training.main, flags_for(root, tmp_path / "outputs", *more))
    assert outcome.code == 0, outcome.text
    assert "voices are paired with voices of one speaker" in outcome.text
    assert "stage unimodal is left out: no data set is for it" in outcome.text
    rows = [r for r in read_json_lines(tmp_path / "outputs" / "metrics.jsonl") if "loss" in r]
    assert all("voxceleb/contrast" in row for row in rows) and len(rows) == 12
    report = read_json(next((tmp_path / "outputs" / "reports").glob("report_*.json")))
    assert report["data"][-1]["pairs"] == "audio with audio of the same voice"


def test_a_run_that_fails_leaves_a_report_that_says_so(data, tmp_path, monkeypatch):
    def breaks(*_: object) -> None:
        raise RuntimeError("the step broke")

    monkeypatch.setattr("multimodal.run_training._backward", breaks)
    outcome = run_here(run_training.main, flags_for(data, tmp_path / "outputs"))
    assert outcome.code == 1
    report = read_json(next((tmp_path / "outputs" / "reports").glob("report_*.json")))
    assert report["status"] == "failed"
    assert report["reason"] == "RuntimeError: the step broke"


def test_sigmoid_trains_with_scale_and_bias(data, tmp_path):
    more = ("--loss", "sigmoid", "--datasets", "coco", "--epochs", 2, "--stage-epochs", "0/1/1")
    output = tmp_path / "outputs"
    assert run_here(run_training.main, flags_for(data, output, *more)).code == 0
    state = load(output / "checkpoints" / "final_model.pt")["model_state_dict"]
    assert state["logit_bias.image_text"].item() != -10.0
    assert state["logit_bias.audio_text"].item() == -10.0
    assert state["logit_scale.image_text"].item() == pytest.approx(2.3026, abs=0.1)


def test_every_sound_can_be_filled_in_and_none(data, tmp_path):
    found = {}
    for choice in ("spectrogram", "keywords"):
        output = tmp_path / choice
        more = ("--audio-pretraining", choice, "--epochs", 1, "--stage-epochs", "1/0/0")
        outcome = run_here(run_training.main, flags_for(data, output, *more))
        assert outcome.code == 0, outcome.text
        rows = [r for r in read_json_lines(output / "metrics.jsonl") if r["split"] == "train"]
        found[choice] = {tag for row in rows for tag in row if "/" in tag}
    assert found["spectrogram"] == {
        "coco/classes", "clotho/spectrogram", "audiocaps/spectrogram",
    }  # fmt: skip
    assert found["keywords"] == {"coco/classes", "clotho/keywords"}


def test_one_sample_a_step_is_enough_where_nothing_is_told_apart(data, tmp_path):
    more = ("--batch-size", 1, "--gradient-accumulation-steps", 1, "--stage-epochs", "1/0/0")
    outcome = run_here(run_training.main, flags_for(data, tmp_path / "o", *more, "--dry-run"))
    assert outcome.code == 0, outcome.text


def test_another_number_of_epochs_is_refused_for_the_same_run(whole, tmp_path):
    output = tmp_path / "outputs"
    shutil.copytree(whole, output)
    place = output / "checkpoints" / "checkpoint_epoch_4.pt"
    outcome = run_here(run_training.main, ["--resume", place, "--epochs", 9])
    assert outcome.code == 2
    assert "cannot continue with epochs: 6 → 9" in outcome.last_line


def test_words_start_from_the_open_clip_file_in_the_data_root(data, tmp_path):
    root = tmp_path / "data"
    (root / "pretrained").mkdir(parents=True)
    (root / "audiocaps").symlink_to(data / "audiocaps")
    words = root / "pretrained" / "words.safetensors"
    table = torch.randn(49408, 32, generator=torch.Generator().manual_seed(0))
    save_file({"token_embedding.weight": table}, words)
    output = tmp_path / "outputs"
    more = ("--pretrained", "auto", "--max-steps", 1, "--stage-epochs", "1/0/0", "--epochs", 1)
    outcome = run_here(run_training.main, flags_for(root, output, *more))
    assert outcome.code == 0, outcome.text
    assert f"starting from {words}: words copied" in outcome.text
    (report,) = (output / "reports").glob("report_*.json")
    assert read_json(report)["pretrained"] == {"file": str(words), "words": "copied"}
    assert status_of(output)["data"]["word embeddings"] == f"copied ({words})"
    state = load(output / "checkpoints" / "final_model.pt")["model_state_dict"]
    assert torch.equal(state["text.token_embedding.weight"], table)  # stage 1 leaves texts alone


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


TRAINER = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("entry", sys.argv[1])
sys.path.insert(0, sys.argv[2])                    # where Python puts a script's directory
sys.modules["entry"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert sys.argv[2] in sys.path
import datasets, torch
from transformers import Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.line(x) - labels).square().mean()}


rows = datasets.Dataset.from_dict({"x": [[1.0], [2.0]], "labels": [[2.0], [4.0]]})
rows.set_format("torch")
options = TrainingArguments(sys.argv[3], max_steps=1, report_to=[], use_cpu=True)
print("steps", Trainer(Line(), options, train_dataset=rows).train().global_step)
"""


@pytest.mark.slow
def test_hugging_faces_trainer_works_beside_the_recipes_datasets_file(tmp_path):
    command = [sys.executable, "-c", TRAINER, SCRIPT, SCRIPT.parent, tmp_path]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "steps 1" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "limit"), [("tiny", 4), ("small", 8), ("base", 12), ("large", 20)]
)
def test_the_estimate_stays_below_the_documented_minimum(size, limit):
    found = memory.plan(
        run_training.step_of(run_training.Config(model_size=size, datasets=("coco",))), 1
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(size).parameters())
    rows = {what: size for what, size, _ in found.rows}
    assert rows["weights"] == pytest.approx(4 * parameters, rel=0.01)  # with the keyword head
    assert rows["optimizer"] == 2 * rows["weights"]
    assert found.total < limit * 10**9


def test_the_estimate_is_printed_and_nothing_is_trained(tmp_path):
    flags = ["--estimate", "--model-size", "nano", "--output-dir", tmp_path / "outputs"]
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 0, outcome.text
    assert "multimodal, nano, batch 8, half precision" in outcome.text
    assert "of each device" in outcome.text
    assert not (tmp_path / "outputs").exists()


def test_checkpointing_and_half_precision_save_what_the_estimate_says(tmp_path):
    rows = {
        (use_checkpoint, use_amp): memory.plan(
            run_training.step_of(
                run_training.Config(
                    model_size="tiny",
                    use_checkpoint=use_checkpoint,
                    use_amp=use_amp,
                    datasets=("coco",),
                )
            ),
            1,
        ).total
        for use_checkpoint in (True, False)
        for use_amp in (True, False)
    }
    assert rows[True, True] < rows[True, False] < rows[False, False]
    assert rows[True, True] < rows[False, True] < rows[False, False]


def test_out_of_memory_ends_with_the_plan_and_what_helps(data, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("multimodal.run_training._backward", fails)
    outcome = run_here(run_training.main, flags_for(data, tmp_path / "outputs"))
    assert outcome.code == 1
    assert "what --estimate says of this run" in outcome.text
    assert "lower --batch-size" in outcome.last_line


def test_the_models_defaults_are_those_of_the_settings_file():
    shown = run_here(run_training.main, ["--print-config"])
    cfg = json.loads(shown.text)
    model = models.create_model.__kwdefaults__
    for name in ("embed_dim", "use_checkpoint", "dropout", "activation"):
        assert cfg[name] == model[name], name
    assert cfg["model_size"] == models.create_model.__defaults__[0] == "base"
