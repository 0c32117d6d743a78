"""Readers of what runs keep, of models' folders and of answers of the net; for tests/fuzzing.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from face_distill import download_weight, embed
from face_distill.distill import model, teacher, verification
from lavic.src import catalogue
from lavic.src.recommend import item_vectors
from lavic.src.recommend import results as recommend_results
from lavic.src.vision import adapter_files, adapters, picture_store
from lavic.src.vision import memory as lavic_memory
from lavic.src.vision import model as llava
from multimodal import embed as multimodal_embed
from multimodal import model as multimodal_model
from multimodal import run_training
from multimodal.pairs import audio, clips, voxceleb
from multimodal.training import evaluation as trained_models
from multimodal.training import report, settings_file
from shared import download, hub, lock, settings, stages
from shared.page import Page
from shared.program import JsonLinesProgress
from tests.fuzz_readers import STATUS, folder, of, picture
from tests.fuzzing import Reader
from vasevqa.filter import clip, place, quality
from vasevqa.model import memory as swift_memory
from vasevqa.model import merging, needs, pictures, plan, runs

CPU = torch.device("cpu")


def tensors(**shapes: tuple[int, ...]) -> Callable[[Path], Any]:
    """What writes a .safetensors file of ones."""
    return lambda path: save_file({n: torch.ones(s) for n, s in shapes.items()}, path)


def hollow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take four bytes each in a file."""
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}


# --- face_distill ---------------------------------------------------------------------------------

PLAN = {"num_images": 5, "batch_size": 2, "embedding_shape": [3], "map_shape": [2, 2]}
BLIP = {
    "model_type": "blip-2", "text_config": {"hidden_size": 8},
    "vision_config": {"model_type": "blip_2_vision_model", "hidden_size": 8,
                      "num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
}  # fmt: skip


def _make_unfinished(directory: Path) -> None:
    features = teacher.UnfinishedFeatures(directory, PLAN)
    features.begin()
    features.write(0, np.ones((2, 3), np.float32), np.ones((2, 2, 2), np.float32))


def _finish_features(directory: Path) -> None:
    """As a killed extraction goes on; on a copy, which it changes."""

    def duplicate(source: str, target: str) -> None:
        os.mkfifo(target) if Path(source).is_fifo() else shutil.copy2(source, target)

    copy = directory.parent / "copy"
    shutil.copytree(directory, copy, symlinks=True, copy_function=duplicate)
    try:
        features = teacher.UnfinishedFeatures(copy, PLAN)
        rows = 5 - (features.begin() or 0)
        features.write(5 - rows, np.ones((rows, 3), "f4"), np.ones((rows, 2, 2), "f4"))
        features.finish(np.arange(5))
    finally:
        for left in copy.parent.glob("copy*"):
            shutil.rmtree(left)


def _read_tower(directory: Path) -> None:
    model._vision_config(directory)
    model._tower_state(directory)


def _read_teacher_rows(directory: Path) -> None:
    pair_set: Any = SimpleNamespace(num_images=4, path="a.bin", image_numbers=np.arange(4))
    verification._distances_of_rows(directory / "a.npy", pair_set)


# --- lavic ----------------------------------------------------------------------------------------

ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "owner/name", "r": 2, "lora_alpha": 4,
    "lora_dropout": 0.1, "target_modules": ["vision_tower.q_proj", "k_proj"], "use_rslora": False,
}  # fmt: skip
CATALOGUE = {"B1": {"images": [{"large": "https://images.example/a.jpg"}, {"large": 3}]}, "B2": {}}
SEEN = [{"name": f"B{n}_0.jpg", "size": 600, "time": 17_000 + n} for n in range(4)]
LOST = [{"split": "train", "name": f"B{n}_0.jpg", "url": "u", "reason": "404"} for n in range(3)]
LLAVA = {"model_type": "llava_next", "text_config": {"model_type": "mistral", "hidden_size": 8},
         "vision_config": {"model_type": "clip_vision_model"}}  # fmt: skip


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_adapter(directory: Path) -> None:
    adapter_files.stage_of(directory)
    adapter_files.base_of(directory)
    adapters._settings(directory)
    adapters._names_in(directory)


def _read_crawl_list(path: Path) -> None:
    for found in catalogue.read_pictures("train", path):
        found.problem  # noqa: B018


def _read_crawl_notes(directory: Path) -> None:
    folder = picture_store.Folder(directory)
    for row in SEEN:
        folder.holds(row["name"])
    folder.close()
    picture_store.Failures(directory / picture_store.FAILURES, {"valid"}).close()


def _read_llava(directory: Path) -> None:
    llava._check_directory(directory)
    lavic_memory.configuration(str(directory))


# --- multimodal -----------------------------------------------------------------------------------

MM_SETTINGS = """\
model:
  size: tiny
  embed_dim: 128
training:
  batch_size: 4
  learning_rate: 3e-4
  datasets: [coco, clotho]
paths:
  data_root: data
"""
MM_REPORT = {
    "schema": report.SCHEMA, "name": "run", "status": "done", "data": [{"data_set": "coco"}],
    "stages": [{"stage": "a", "epochs": 1}],
}  # fmt: skip
CLIPS = [{"key": f"abc_{n}", "split": "train", "status": "ok", "reason": ""} for n in range(3)]


def _make_trained(path: Path) -> None:
    made = multimodal_model.create_model("nano", num_classes=3, embed_dim=16)
    about = {"size": "nano", "num_classes": 3, "embed_dim": 16}
    head = torch.nn.Linear(16, 2).state_dict()
    content = {"model": about, "settings": {"a": 1}, "keywords": ["dog"], "keyword_head": head}
    torch.save(content | {"model_state_dict": hollow(made.state_dict())}, path)


def _read_clip_ledger(directory: Path) -> None:
    ledger = clips.Ledger(directory)
    ledger.is_gone(cast(Any, SimpleNamespace(key="abc_1")))


def _read_mm_settings(path: Path) -> None:
    known = settings.leaves(run_training.Config())
    settings_file.read(path, known)


def _make_features(directory: Path) -> None:
    import soundfile

    soundfile.write(directory / "a.wav", np.sin(np.arange(1600) / 7).astype(np.float32), 16_000)
    audio.FeatureCache(directory / "cache").features(directory / "a.wav")


# --- vasevqa --------------------------------------------------------------------------------------

FOUND = [
    {"filename": f"tray/{n}.jpg", "size": n, "mtime_ns": n, "content": f"{n:032x}", "score": n / 4}
    for n in range(4)
]
STATE = {"global_step": 6, "log_history": [{"loss": 0.5, "step": 6}]}
RUN = {"identity": {"seed": 1, "model": "m"}, "base_files": [["model.safetensors", 1, 2]]}
QWEN = {"model_type": "qwen2_5_vl", "hidden_size": 8}
CLIP = {"model_type": "clip", "projection_dim": 8}
PREPARE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "resample": 3}
SWIFT_LOG = [
    {"loss": 0.5, "epoch": 1.0, "global_step/max_steps": f"{n}/4", "memory(GiB)": 1.5,
     "train_speed(s/it)": 0.2, "learning_rate": 1e-4}
    for n in range(1, 5)
] + [{"best_model_checkpoint": "v0/checkpoint-4"}]  # fmt: skip


def _read_rows(directory: Path) -> None:
    items = [place.Item(row["filename"], row["size"], row["mtime_ns"]) for row in FOUND]
    keys = np.array([item.key for item in items], np.uint64)
    table = place.Table(directory / "scores.jsonl", keys, ("score",))
    table.decide(0.5, "accepted", "rejected")
    table.find_duplicates("accepted")
    list(table.rows())
    table.unreadable()


def _make_embeddings(directory: Path) -> None:
    with clip.Embeddings(directory / "embeddings.bin", 3) as known:
        known.add([clip.digest_of(b"a"), clip.digest_of(b"b")], np.ones((2, 3), np.float32))


def _read_embeddings(directory: Path) -> None:
    with clip.Embeddings(directory / "embeddings.bin", 3) as known:
        known.add([clip.digest_of(b"c")], np.ones((1, 3), np.float32))
        assert known.get(clip.digest_of(b"c")).tolist() == [1, 1, 1]


def _continue_swift(directory: Path) -> None:
    runs._why_not(directory, {"seed": 1})
    os.close(lock.take(directory))
    runs.named(directory)


def _read_swift_model(directory: Path) -> None:
    problems = list(needs.model({"model": [str(directory)]}, is_grpo=False))
    plan.architecture(str(directory))
    swift_memory.configuration(directory)
    if not problems:
        dict(merging._shapes(directory))


def _read_merge_notes(directory: Path) -> None:
    merging._noted_files(directory / "checkpoint-6")
    merging._recorded_base(directory / "checkpoint-6")


def _follow_swift(directory: Path) -> None:
    content = (directory / "logging.jsonl").read_bytes()
    (directory / "metrics.jsonl").unlink(missing_ok=True)
    (directory / "logging.jsonl").write_bytes(b"")
    follow = JsonLinesProgress(directory)
    (directory / "logging.jsonl").write_bytes(content)
    json.dumps(follow(), allow_nan=False)


def _read_clip(directory: Path) -> None:
    clip.find(directory)
    clip._prepared_as(directory, 32)


def _make_net(path: Path) -> None:
    net = quality.ImageQualityNet(arch="resnet10")
    state = hollow(net.state_dict())
    torch.save({"arch": "resnet10", "image_size": 32, "model_state_dict": state}, path)


class Tags(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


# --- shared ---------------------------------------------------------------------------------------

REMOTE = [download.File("a.bin", 10, "sha256:" + "0" * 64, ())]
NOTED = {"files": {"a.bin": [REMOTE[0].checksum, 10, 5]}, "parts": {"a.bin": REMOTE[0].checksum}}
HTML = """<h1 onclick="x()">A</h1><script>alert(1)</script><table><tr><td>1</td></tr></table>
<img src="data:image/png;base64,AAAA" alt="a"><a href="javascript:x">b</a><svg viewBox="0 0 1 1">
<path d="M0 0"/></svg><!-- c --><style>p{}</style>&lt;&#x41;<p style="x">d<b>e</p>"""


def _read_notes(directory: Path) -> None:
    notes = download.Notes(directory)
    notes.knows(REMOTE[0])
    notes.part_size(REMOTE[0])


def _read_index(directory: Path) -> None:
    content = (directory / "index.json").read_bytes()
    files = {download_weight.INDEX: download.File(download_weight.INDEX, len(content), "", ())}
    repository = hub.Repository("a/b", "c", "http://localhost", files, cast(Any, None))
    with mock.patch.object(hub.Repository, "read", lambda *_: content):
        download_weight.weight_files(repository, "b")


def _read_html(directory: Path) -> None:
    text = (directory / "page.html").read_bytes().decode("utf-8", "replace")
    page, seen = Page("a page"), Tags()
    page.frame("page.html", text)
    seen.feed(page.render())
    assert not seen.tags & {"script", "object", "form", "a", "img", "svg"}  # all in the frame
    assert "sandbox" in [name for name, _ in seen.attributes]
    assert not [name for name, _ in seen.attributes if name.startswith("on")]


def _run_stages(directory: Path) -> None:
    made = stages.Stage("train", lambda: 0, {"rows": 3, "files": ["a"]}, (directory,))
    assert stages.run_stages([made], stages.StageOptions(), directory) == 0


READERS: dict[str, Reader] = {
    "unfinished features": Reader(_make_unfinished, _finish_features, slowness=2),
    "teacher rows": folder(
        {"a.npy": lambda path: np.save(path, np.ones((4, 3), np.float32))}, _read_teacher_rows
    ),
    "BLIP-2 folder": folder(
        {
            "config.json": BLIP,
            "model.safetensors": tensors(**{"vision_model.a": (2, 3), "other": (1,)}),
        },
        _read_tower,
    ),
    "names of embeddings": folder(
        {"out.json": '{"files": ["a.jpg"]}'},
        lambda d: embed._prepare_out(d / "out.npy", d / "out.json"),
    ),
    "lavic adapter": folder(
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": tensors(a=(2, 3))},
        _read_adapter,
        slowness=5,
    ),
    "lavic vectors": Reader(
        lambda d: item_vectors._Store(d).write({"ab": torch.ones(2, 3), "cd": torch.ones(1, 3)}),
        lambda d: item_vectors._Store(d).read(["ab", "ef"]),
    ),
    "lavic crawl items": of("items.json", CATALOGUE, _read_crawl_list),
    "lavic crawl lines": of(
        "a.jsonl",
        lines({"image_name": "B1_0.jpg", "image": "https://images.example/b.jpg"}),
        _read_crawl_list,
    ),
    "lavic crawl notes": folder(
        {
            picture_store.VERIFIED: lines(*SEEN),
            picture_store.FAILURES: lines(*LOST),
            "B1_0.jpg": picture("JPEG"),
        },
        _read_crawl_notes,
    ),
    "lavic summary": folder(
        {"results_summary.csv": "category,run,HitRatio@1\nbeauty,1,0.5\n"},
        recommend_results.read_summary,
    ),
    "lavic model folder": folder(
        {
            "config.json": LLAVA,
            "tokenizer_config.json": "{}",
            "model.safetensors": tensors(a=(2, 3)),
        },
        _read_llava,
        slowness=5,
    ),
    "multimodal settings": of("c.yaml", MM_SETTINGS, _read_mm_settings, slowness=2),
    "multimodal report": of(
        "report.json",
        MM_REPORT,
        lambda path: report.add_section(path, "left_out", [{"data set": "a"}]),
    ),
    "multimodal clips": folder({"clips.jsonl": lines(*CLIPS)}, _read_clip_ledger),
    "multimodal speakers": folder(
        {"vox1_meta.csv": "id\tname\tset\nid10270\tA\ttest\nid10271\tB\tdev\n"},
        voxceleb._test_speakers,
    ),
    "multimodal texts": of(
        "texts.txt", "a dog\n\n a  cat \n", lambda path: multimodal_embed._lines(path, "texts")
    ),
    "multimodal features": Reader(
        _make_features,
        lambda d: audio.FeatureCache(d / "cache").features(d / "a.wav"),
        (audio.AudioError,),
    ),
    "multimodal checkpoint": of(
        "best_model.pt",
        _make_trained,
        lambda path: trained_models.open_trained(path, CPU),
        slowness=5,
    ),
    "vasevqa filter rows": folder({"scores.jsonl": lines(*FOUND)}, _read_rows),
    "vasevqa embeddings": Reader(_make_embeddings, _read_embeddings),
    "vasevqa quality net": of(
        "best.pth", _make_net, lambda path: quality.load_trained(path, CPU), slowness=10
    ),
    "vasevqa CLIP folder": folder(
        {"config.json": CLIP, "preprocessor_config.json": PREPARE}, _read_clip
    ),
    "vasevqa swift run": folder(
        {
            "status.json": STATUS | {"state": "stopped"},
            "config.json": RUN,
            "v0/checkpoint-6/trainer_state.json": STATE,
            "v0/checkpoint-6/model.safetensors": tensors(a=(2, 3)),
        },
        _continue_swift,
    ),
    "vasevqa model folder": folder(
        {
            "config.json": QWEN,
            "model.safetensors.index.json": '{"weight_map": {"a": "one.safetensors"}}',
            "one.safetensors": tensors(a=(2, 3)),
        },
        _read_swift_model,
        slowness=5,
    ),
    "vasevqa merge notes": folder(
        {
            "config.json": RUN,
            "checkpoint-6/args.json": '{"model": "m"}',
            "checkpoint-6/adapter_config.json": ADAPTER,
        },
        _read_merge_notes,
    ),
    "vasevqa checked pictures": folder(
        {
            "seen.json": '{"a.png": [[1, 2], null], "b.png": [[3, 4], "empty"]}',
            "a.png": picture("PNG"),
        },
        lambda d: pictures.check_all([d / "a.png"], d / "seen.json", lambda *_: None),
    ),
    "swift's log": folder({"logging.jsonl": lines(*SWIFT_LOG)}, _follow_swift, opens=False),
    "stage markers": Reader(_run_stages, _run_stages),
    "download notes": folder({download.NOTES: NOTED, "a.bin": b"0123456789"}, _read_notes),
    "Hub's index": folder(
        {"index.json": '{"weight_map": {"b.a": "one.safetensors"}}'}, _read_index, opens=False
    ),
    "foreign HTML": folder({"page.html": HTML}, _read_html, slowness=5, opens=False),
}
