"""The readers that tests/fuzzing.py is let loose on: a line each, with a small whole file."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # now: its first import may ask fc-list for fonts
import numpy as np
import torch
from PIL import Image

from arcface.inshop_retrieval import config as mm_config
from arcface.inshop_retrieval import inshop, recipe
from face_distill.demo_data import records
from face_distill.distill import pairs as face_pairs
from face_distill.distill import recordio, teacher
from face_distill.distill import student_files as face_settings
from shared import (
    checkpoint,
    config,
    files,
    images,
    report,
    run_directory,
    run_status,
    run_text,
    seed,
    weights,
)
from shared.checkpoint import DamagedError, Position
from shared.distributed import World
from tests.faults.probe_recipe import Config
from tests.fuzzing import Reader


def picture(kind: str, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind)
    return written.getvalue()


def put(name: str, content: Any) -> Callable[[Path], Any]:
    """What writes one file: of bytes, of text, of a value as JSON, or by a function of its path."""

    def make(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            path.write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def of(
    name: str, content: Any, read: Callable[[Path], Any], *allowed: type[Exception], **more: Any
) -> Reader:
    """A reader of one file of that name."""
    return Reader(put(name, content), lambda directory: read(directory / name), allowed, **more)


def folder(contents: dict[str, Any], read: Callable[[Path], Any], **more: Any) -> Reader:
    """A reader of a folder of these files: name → content, as for `put`."""
    makers = [put(name, content) for name, content in contents.items()]
    return Reader(lambda directory: [make(directory) for make in makers], read, **more)


# --- face_distill ---------------------------------------------------------------------------------


def _make_records(directory: Path) -> None:
    labels: list[Any] = [np.array([3.0, 5.0], np.float32), 1.0, 1.0, 2.0]
    payloads = [records.pack(label, picture("JPEG")) for label in labels]
    payloads[2] += recordio.MAGIC_BYTES * 3  # split over several parts
    items = list(enumerate(payloads))
    records.write_records(directory / "train.rec", directory / "train.idx", items)


def _read_records(directory: Path) -> None:
    reader = recordio.RecordReader(directory / "train.rec", directory / "train.idx")
    for key in reader.keys:
        recordio.unpack(reader.read(int(key)), "record")


def _make_features(directory: Path) -> None:
    chance = np.random.default_rng(0)
    maps = chance.random((6, 7, 7), np.float32)
    np.save(directory / teacher.EMBEDDING, chance.random((6, 5), np.float32))
    np.save(directory / teacher.MAP, maps / maps.sum((1, 2), keepdims=True))
    np.save(directory / teacher.LABELS, np.arange(6))
    (directory / teacher.MANIFEST).write_text('{"map": "probability", "selection": "first_n"}')


def _make_pairs(path: Path) -> None:
    path.write_bytes(pickle.dumps(([picture("JPEG", n) for n in range(4)], [True, False])))


def _make_old_pairs(path: Path) -> None:
    arrays = [np.frombuffer(picture("PNG", n), np.uint8) for n in range(4)]
    path.write_bytes(pickle.dumps((arrays, np.array([True, False])), protocol=2))


def _read_pairs(path: Path) -> None:
    found = face_pairs.read_pairs(path)
    face_pairs.decode(found.images[:2])


# --- arcface --------------------------------------------------------------------------------------

LIST = "4\nimage_name item_id evaluation_status\n" + "".join(
    f"img/WOMEN/Dresses/id_0000000{n}/02_1_front.jpg id_0000000{n} {split}\n"
    for n, split in enumerate(("train", "train", "query", "gallery"))
)
WHOLE_CONFIG = mm_config.RECIPE / "config/arcface/resnet18-arcface_demo.py"


def _read_list(path: Path) -> None:
    found = inshop.read_list(path)
    found.remarks()
    for split in inshop.SPLITS:
        found.labels(split)


def _make_recipe(path: Path) -> None:
    path.write_text(json.dumps(mm_config.read_config(WHOLE_CONFIG)))


def _read_recipe(directory: Path) -> None:
    """A configuration whose values were damaged: everything that the recipe makes of them."""
    content = files.read_json(directory / "recipe.json")
    if isinstance(content, dict):
        recipe.deciding(recipe.read_recipe(content)[0])


def _read_options(directory: Path) -> None:
    text = (directory / "options.txt").read_text(encoding="utf-8", errors="replace")
    mm_config.with_options({"model": {"depth": 50}, "list": [1, {"a": 2}]}, text.split("\n"))


# --- shared ---------------------------------------------------------------------------------------

STATE = {
    "parts": {"model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}},
    "position": {"step": 3, "epoch": 1, "batch": 0},
    "generators": [{"torch": torch.zeros(8, dtype=torch.uint8), "numpy": [1, 2], "name": "MT"}],
    "world_size": 1,
}
SETTINGS = {"settings": {"epochs": 3, "width": 16, "dropout": 0.1, "fault": "", "seed": 0}}
YAML = "epochs: 5\nwidth: 32\ndropout: 2e-1\naugment: no\nrun-dir: /tmp/x\namp: off\nseed: 0x10\n"
ROWS = "".join(
    json.dumps({"step": n, "epoch": 0, "split": "train", "time": 1.5, "loss": 1 / n}) + "\n"
    for n in range(1, 9)
)
STATUS = {
    "recipe": "probe", "state": "done", "exit_code": 0, "reason": "8 steps", "pid": 1, "step": 8,
    "total_steps": 8, "started_at": "2026-01-02T03:04:05Z", "updated_at": "2026-01-02T03:05:05Z",
    "result": {"name": "loss", "before": 1.0, "after": 0.1, "higher_is_better": False},
    "last": {"loss": 0.1}, "best": {}, "outputs": ["pages/a.png"], "eta_s": 0.0,
}  # fmt: skip


def _make_old_weights(path: Path) -> None:
    state = {"model": STATE["parts"]["model"]}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _make_run(directory: Path) -> None:
    net, optimizer = _parts()
    for parameter in net["model"].parameters():  # without autograd, which may not be forked
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = {**net, "optimizer": optimizer}
    state = checkpoint.snapshot(parts, Position(3, 1, 0), [seed.get_state()])
    checkpoint.save(directory / "last.pt", state)
    (directory / "config.json").write_text(json.dumps({"identity": {"lr": 0.1, "seed": 0}}))
    (directory / "status.json").write_text(json.dumps(STATUS | {"state": "stopped"}))


def _parts() -> tuple[dict[str, Any], torch.optim.Optimizer]:
    net = torch.nn.Linear(3, 2)
    return {"model": net}, torch.optim.AdamW(net.parameters())


def _continue_run(directory: Path) -> None:
    """What `Run.restore` does."""
    decision = run_directory.decide(directory, "last.pt", "auto", {"lr": 0.1, "seed": 0}, False)
    net, optimizer = _parts()
    parts, world = {**net, "optimizer": optimizer}, World()
    run_directory.continue_from(decision, parts, world, total_steps=10, allow_reshard=False)


def _make_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path)


def _make_shards(directory: Path) -> None:
    _make_safetensors(directory / "one.safetensors")
    names = dict.fromkeys(("a.weight", "b"), "one.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _read_lines(path: Path) -> None:
    rows = list(files.read_json_lines(path))
    assert all(isinstance(row, dict) for row in rows)
    files.cut_json_lines(path, lambda row: row.get("step", 0) != 3)


def _read_settings(path: Path) -> None:
    config.parse(Config, ["--config", str(path)])


def _resume(directory: Path) -> None:
    config.parse(Config, ["--resume", str(directory)])


KINDS = ("WEBP", "BMP", "GIF", "TIFF", "PPM")

READERS: dict[str, Reader] = {
    "RecordIO": Reader(_make_records, _read_records),
    "teacher npy": Reader(_make_features, teacher.TeacherFeatures),
    "pairs bin": of("lfw.bin", _make_pairs, _read_pairs),
    "old pairs bin": of("cfp.bin", _make_old_pairs, _read_pairs),
    "student's settings": folder(
        {"config.json": SETTINGS}, lambda d: face_settings.settings_of(d / "x.pth")
    ),
    "list file": of("list.txt", LIST, _read_list),
    "recipe": folder({"recipe.json": _make_recipe}, _read_recipe),
    "cfg-options": folder(
        {"options.txt": "model.depth=18\nlist.1.a=[1,(2,'x')]\nmodel.name=dict(a=1)"},
        _read_options,
        opens=False,
    ),
    "stored configuration": folder(
        {"config.json": {"settings": {"configuration": {"a": {"b": [1, 2]}}}}},
        recipe.stored_configuration,
    ),
    "json": of("a.json", STATUS, files.read_json),
    "json lines": of("a.jsonl", ROWS, _read_lines),
    "yaml settings": of("c.yaml", YAML, _read_settings, slowness=5),
    "resumed settings": folder({"config.json": SETTINGS}, _resume, slowness=5),
    "checkpoint": of(
        "last.pt", lambda path: torch.save(STATE, path), checkpoint.load, DamagedError
    ),
    "weights pth": of(
        "w.pth",
        lambda path: torch.save({"state_dict": STATE["parts"]["model"]}, path),
        weights.read,
    ),
    "weights of old torch": of("w.pth", _make_old_weights, weights.read),
    "run to continue": Reader(_make_run, _continue_run),
    "weights safetensors": of("w.safetensors", _make_safetensors, weights.read),
    "weights in shards": Reader(_make_shards, weights.read),
    "JPEG": of("a.jpg", picture("JPEG"), images.read_rgb, ValueError),
    "PNG": of("a.png", picture("PNG"), images.read_rgb, ValueError),
    "other pictures": folder(
        {f"a.{kind}": picture(kind) for kind in KINDS},
        lambda d: [images.problem(d / f"a.{kind}") for kind in KINDS],
    ),
    "run report": folder(
        {
            "status.json": STATUS,
            "config.json": SETTINGS,
            "metrics.jsonl": ROWS,
            "pages/a.png": picture("PNG"),
            "pages/b.html": "<h1>Sheet</h1><table><tr><td>1</td></tr></table>",
            "pages/c.svg": '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>',
        },
        report.write,
        slowness=10,
    ),
    "run as the monitor sees it": folder(
        {"status.json": STATUS, "metrics.jsonl": ROWS},
        lambda d: run_text.block(run_status.view(d), 80),
    ),
}
