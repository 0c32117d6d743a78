"""The recipe's built-in demo: small data, teacher and tower in the real on-disk formats.

    <root>/data/faces_emore            train.rec, train.idx, property, lfw.bin
    <root>/data/teacher_features_12k   teacher_embedding.npy, teacher_feat_map.npy,
                                       teacher_labels.npy, manifest.json
    <root>/data/teacher_pairs          lfw.npy: the teacher's embeddings of lfw.bin's pictures
    <root>/weights/blip2_weights       a tiny BLIP-2 as a sharded checkpoint

Faces are procedural (faces.py). The people of lfw.bin are not among those of train.rec, and no
person of one of its ten folds is in another. The teacher (teacher.py) has learnt from other people,
five times as many. Generator and seed stay as they are: training is tuned to the data, never the
data to the training.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from face_distill.demo_data import records
from face_distill.demo_data import teacher as teachers
from face_distill.demo_data.faces import NUM_LATENTS, SIZE, draw_face, draw_shot, look_of
from face_distill.demo_data.teacher import FisherTeacher, thumbnail
from face_distill.FaceDataset import FaceDataset
from shared.build_once import build_once
from shared.files import write_atomic, write_json, write_text

VERSION = 2  # of what is drawn and written; another number rebuilds
NUM_PEOPLE, PICTURES_EACH = 100, 4
TEACHER_PEOPLE = teachers.PEOPLE
NUM_FOLDS, PEOPLE_A_FOLD, PICTURES_OF_STRANGER, PAIRS_A_FOLD = 10, 6, 10, 60
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 16,
    "initializer_range": 0.02,  # the library's default, 1e-10, makes every image the same
}
# One random stream each; a new one goes to the end, so that the others draw what they always did.
_PEOPLE, _PICTURES, _STRANGERS, _PAIRS, _TEACHER = range(5)


@dataclass(frozen=True)
class DemoPaths:
    """Where a finished demo lies."""

    root: Path

    @property
    def data_root(self) -> Path:
        """The faces_emore directory."""
        return self.root / "data" / "faces_emore"

    @property
    def pairs(self) -> Path:
        """Pairs of unseen people, in the form of lfw.bin."""
        return self.data_root / "lfw.bin"

    @property
    def teacher(self) -> Path:
        """The directory of the teacher's files."""
        return self.root / "data" / "teacher_features_12k"

    @property
    def teacher_pairs(self) -> Path:
        """The teacher's embeddings of the pictures of `pairs`, one row each, (2 P, 24) float32."""
        return self.root / "data" / "teacher_pairs" / "lfw.npy"

    @property
    def weights(self) -> Path:
        """The tiny tower's checkpoint directory."""
        return self.root / "weights" / "blip2_weights"

    @property
    def parts(self) -> list[Path]:
        """The directories that all of it lies in."""
        return [self.data_root, self.teacher, self.teacher_pairs.parent, self.weights]


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, drawn now unless a finished one of this version and seed is there."""
    paths = DemoPaths(Path(root))
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "demo.json", made, paths.parts, lambda: _build(paths, seed))
    return paths


def _build(paths: DemoPaths, seed: int) -> None:
    for directory in paths.parts:
        directory.mkdir(parents=True, exist_ok=True)
    latents = _stream(seed, _PEOPLE).standard_normal((NUM_PEOPLE, NUM_LATENTS))
    faces = _write_training_set(paths.data_root, latents, seed)
    pairs = _write_pairs(paths.pairs, seed)
    teacher = FisherTeacher(_stream(seed, _TEACHER), TEACHER_PEOPLE)
    _write_teacher(paths, teacher, faces, seed)
    _save(paths.teacher_pairs, teacher.embeddings(pairs))
    write_tower(paths.weights, seed)


# --- faces_emore ----------------------------------------------------------------------------------


def _write_training_set(directory: Path, latents: np.ndarray, seed: int) -> np.ndarray:
    """Write train.rec, train.idx and property; returns the teacher's view of the pictures."""
    rng = _stream(seed, _PICTURES)
    drawn = [_picture(person, rng) for person in latents for _ in range(PICTURES_EACH)]
    images = [jpeg for jpeg, _ in drawn]
    records.write_records(directory / "train.rec", directory / "train.idx", _records(images))
    write_text(directory / "property", f"{NUM_PEOPLE},{SIZE},{SIZE}\n")
    return np.stack([view for _, view in drawn])


def _records(images: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Keys and payloads: the header, the images from key 1, one identity record a person."""
    image_end = len(images) + 1
    header = np.array([image_end, image_end + NUM_PEOPLE], np.float32)
    yield 0, records.pack(header, b"")
    for key, jpeg in enumerate(images, 1):
        yield key, records.pack(float((key - 1) // PICTURES_EACH), jpeg, key)
    for person in range(NUM_PEOPLE):
        start = 1 + person * PICTURES_EACH
        bounds = np.array([start, start + PICTURES_EACH], np.float32)
        yield image_end + person, records.pack(bounds, b"", image_end + person)


def _picture(person: np.ndarray, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """One JPEG of a person, and the teacher's view of the picture."""
    from PIL import Image

    pixels = draw_face(look_of(person), draw_shot(rng))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
    return encoded.getvalue(), thumbnail(pixels)


# --- pairs of unseen people -----------------------------------------------------------------------


def _write_pairs(path: Path, seed: int) -> np.ndarray:
    """Write lfw.bin: a pickle of (2 P JPEG byte strings, P truth values), fold after fold.

    Returns the teacher's view of the 2 P pictures.
    """
    rng = _stream(seed, _STRANGERS)
    people = rng.standard_normal((NUM_FOLDS * PEOPLE_A_FOLD, NUM_LATENTS))
    album = [[_picture(z, rng) for _ in range(PICTURES_OF_STRANGER)] for z in people]
    pair_rng = _stream(seed, _PAIRS)
    shown: list[tuple[bytes, np.ndarray]] = []
    same: list[bool] = []
    for first in range(0, len(people), PEOPLE_A_FOLD):
        for a, b in _fold(pair_rng):
            shown += [album[first + person][picture] for person, picture in (a, b)]
            same.append(a[0] == b[0])
    content = pickle.dumps(([jpeg for jpeg, _ in shown], same), protocol=4)
    write_atomic(path, lambda stream: (stream.write(content), None)[1])
    return np.stack([view for _, view in shown])


def _fold(rng: np.random.Generator) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Distinct pairs of (person, picture) in a fold: half of one person, then half of two."""
    shots = [(p, k) for p in range(PEOPLE_A_FOLD) for k in range(PICTURES_OF_STRANGER)]
    pairs = [(a, b) for i, a in enumerate(shots) for b in shots[i + 1 :]]
    same = [pair for pair in pairs if pair[0][0] == pair[1][0]]
    different = [pair for pair in pairs if pair[0][0] != pair[1][0]]
    half = PAIRS_A_FOLD // 2
    return [
        of_kind[int(chosen)]
        for of_kind in (same, different)
        for chosen in rng.choice(len(of_kind), half, replace=False)
    ]


# --- the teacher ----------------------------------------------------------------------------------


def _write_teacher(paths: DemoPaths, teacher: FisherTeacher, views: np.ndarray, seed: int) -> None:
    people = np.repeat(np.arange(NUM_PEOPLE), PICTURES_EACH)
    _save(paths.teacher / "teacher_embedding.npy", teacher.embeddings(views))
    _save(paths.teacher / "teacher_feat_map.npy", teacher.maps(views))
    _save(paths.teacher / "teacher_labels.npy", people.astype(np.int64))
    faces = FaceDataset(paths.data_root, "first_n", len(people), cache=False)
    manifest = {
        "schema": 1,
        "teacher": f"Fisher's analysis of {TEACHER_PEOPLE} other people (seed {seed})",
        "selection": "first_n",
        "selection_sha256": faces.selection_sha256(),
        "num_images": len(people),
        "image_size": SIZE,
        "map": "probability",
    }
    write_json(paths.teacher / "manifest.json", manifest)


def _save(path: Path, array: np.ndarray) -> None:
    write_atomic(path, lambda stream: np.save(stream, array, allow_pickle=False))


# --- the tower ------------------------------------------------------------------------------------


def write_tower(directory: Path, seed: int) -> None:
    """Write a tiny BLIP-2 as the library does: config.json, an index and two safetensors shards."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2ForConditionalGeneration(Blip2Config(**_tower_config()))
        _resemble_training(model.vision_model)
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    model.save_pretrained(directory, max_shard_size=f"{int(650 * megabytes)}KB")
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "size": {"height": SIZE, "width": SIZE},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def _tower_config() -> dict[str, Any]:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    return {
        "vision_config": dict(TOWER),
        "qformer_config": {
            **small,
            "intermediate_size": 64,
            "encoder_hidden_size": TOWER["hidden_size"],
        },
        "text_config": {
            **small,
            "model_type": "opt",
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
        "num_query_tokens": 4,
    }


def _resemble_training(tower: Any) -> None:
    """Give a random tower three traits of every trained one that small random numbers lack.

    Blocks are as strong as in the real tower of 1408 channels: at a width of 96 the same deviation
    of the weights would leave attention and MLP without any effect. Patches know where they are.
    The final norm weighs channels differently: with equal weights every token has the same energy,
    and no attention map can be read from it.
    """
    import torch

    strength = (1408 / TOWER["hidden_size"]) ** 0.5
    with torch.no_grad():
        for layer in tower.encoder.layers:
            for weight in (p for p in layer.parameters() if p.dim() == 2):
                weight.mul_(strength)
        tower.embeddings.position_embedding[0] = 0.5 * torch.randn(1, TOWER["hidden_size"])
        tower.embeddings.position_embedding[0, 1:] = _smooth_positions()
        norm = tower.post_layernorm
        norm.weight.copy_(torch.exp(0.1 * torch.randn(norm.weight.shape)))
        norm.bias.copy_(0.1 * torch.randn(norm.bias.shape))


def _smooth_positions() -> Any:
    """Plane waves of random direction over the patches, (patches, channels), deviation 0.5."""
    import torch

    side = TOWER["image_size"] // TOWER["patch_size"]
    ramp = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.cartesian_prod(ramp, ramp)
    waves = 2.0 * torch.randn(2, TOWER["hidden_size"])
    phases = 2 * math.pi * torch.rand(TOWER["hidden_size"])
    return 0.5 * math.sqrt(2) * torch.sin(grid @ waves + phases)


def _stream(seed: int, part: int) -> np.random.Generator:
    return np.random.default_rng([1, seed, part])  # the pairs stay those of every version
