"""Search your own pictures and sounds by words, with a trained model; features and labels of them.

python embed.py --images photos/ --query "a dog on a beach"             prints the best ten
python embed.py --images photos/ --texts captions.txt --audio sounds/   images.npy, texts.npy …
python embed.py --images photos/ --labels labels.txt                    and zero_shot.json
python embed.py --images a.jpg b.png --checkpoint FILE.pt --out DIRECTORY
python embed.py --images photos/ --demo                                 with the demo's model

Row i of a .npy (N, D), float32 and of unit length, belongs to name i of embeddings.json, so that
a product of two files compares everything with everything. Texts and labels stand one on a line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError, shown
from shared.files import make_output, read_text, write_atomic, write_json
from shared.launch import launch_alone
from shared.settings import Count, Range, Workers

if TYPE_CHECKING:
    from multimodal.training.evaluation import Embedder, Features, Kind
    from shared.images import Skipped

RECIPE = Path(__file__).resolve().parent
OUTPUTS = RECIPE / "outputs"
OUT = RECIPE / "embeddings"
_BEST = 10  # files that a query prints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the embedding."""

    images: tuple[str, ...] = option((), "picture files, or folders of them")
    audio: tuple[str, ...] = option((), "sound files (wav, flac, ogg, mp3), or folders of them")
    texts: Path | None = option(None, "text file, a caption on each line")
    query: str | None = option(None, "a text: print the ten pictures and sounds that fit it best")
    labels: Path | None = option(None, "text file, a label on each line: tell which fits best")
    template: str = option("a picture of {}", "what a label is put into, for pictures")
    audio_template: str = option("the sound of {}", "the same for sounds")
    checkpoint: Path = option(OUTPUTS, "a checkpoint, or a run's output directory (its best model)")
    out: Path = option(OUT, "directory for the results")
    batch_size: Count = option(64, "pictures or sounds at a time")
    workers: Workers = option(4, "processes that read files; 0: none but this")
    max_seconds: Annotated[float, Range(0, 3600, above=True)] = option(
        30.0, "of a sound that are used, from its beginning"
    )
    tool: ToolOptions = field(default_factory=ToolOptions)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("template", "audio_template"):
            if "{}" not in getattr(self, name):
                raise ValueError(f"{name} {shown(getattr(self, name))} needs {{}} for the label")


@dataclass(frozen=True)
class Inputs:
    """What is to be embedded."""

    images: list[Path]
    audio: list[Path]
    texts: list[str]
    labels: list[str]
    others: Skipped  # files of the folders that are of neither kind


DEMO = {
    "checkpoint": RECIPE / "demo" / "runs" / "outputs",
    "out": RECIPE / "demo" / "embeddings",
    "workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then embed; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    from multimodal.pairs.sources import SOUNDS
    from multimodal.training.evaluation import checkpoint_at
    from shared.images import SUFFIXES

    inputs = Inputs(
        _files(cfg.images, SUFFIXES, "images"), _files(cfg.audio, SOUNDS, "audio"),
        _lines(cfg.texts, "texts"), _lines(cfg.labels, "labels"),
        _others((*cfg.images, *cfg.audio), {*SUFFIXES, *SOUNDS}),
    )  # fmt: skip
    if not (inputs.images or inputs.audio or inputs.texts):
        raise UserError("nothing to embed: give --images, --audio or --texts")
    if cfg.query is not None and not (cfg.query.strip() and (inputs.images or inputs.audio)):
        raise UserError(
            f"--query {shown(cfg.query)}: give a text, and --images or --audio to search"
        )
    checkpoint = checkpoint_at(cfg.checkpoint)
    log.info(
        "%d pictures, %d sounds, %d texts by %s",
        len(inputs.images), len(inputs.audio), len(inputs.texts), checkpoint,
    )  # fmt: skip
    if cfg.tool.dry_run:
        return 0
    make_output(cfg.out)
    return _embed(cfg, inputs, checkpoint)


def _files(given: tuple[str, ...], suffixes: Collection[str], flag: str) -> list[Path]:
    """The files that were named, and those in the folders that were named, in order."""
    from shared.images import find_images

    found: list[Path] = []
    for text in given:
        path = Path(text).expanduser().absolute()
        if path.is_dir():
            below = [path / name for name in find_images(path, suffixes)]
            if not below:
                kinds = " ".join(sorted(suffixes))
                raise UserError(f"--{flag} {text}: the folder holds none of {kinds}")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--{flag} {text}: no such file or folder")
    return found


def _others(given: tuple[str, ...], known: set[str]) -> Skipped:
    """The files of the folders that are no pictures and no sounds by their names, each logged."""
    from shared.images import Skipped

    found = Skipped("files")
    for folder in map(Path, given):
        for path in sorted(folder.expanduser().absolute().rglob("[!.]*")):
            if path.is_file() and path.suffix.lower() not in known:
                found.add(str(path), "no picture and no sound by its name")
    return found


def _lines(path: Path | None, flag: str) -> list[str]:
    """The lines of a text file that are not empty."""
    if path is None:
        return []
    try:
        lines = read_text(path, "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag} {path} cannot be read as UTF-8 text: {error}") from None
    found = [" ".join(line.split()) for line in lines if line.strip()]
    if not found:
        raise UserError(f"--{flag} {path} holds no text")
    return found


def _embed(cfg: Config, inputs: Inputs, checkpoint: Path) -> int:
    from multimodal.pairs import samples
    from multimodal.pairs.samples import Sounds
    from multimodal.training.evaluation import Embedder, open_trained
    from shared.device import resolve

    device = resolve(cfg.tool.device, 0, os.environ)
    trained = open_trained(checkpoint, device)
    embed = Embedder(trained, device, cfg.tool.amp, cfg.batch_size, cfg.workers)
    size, hear = trained.model.image_size, Sounds(train=False, eval_seconds=cfg.max_seconds)
    names: dict[str, Any] = {"checkpoint": str(checkpoint), "skipped": inputs.others.names}
    zero_shot: dict[str, Any] = {}
    asked = embed.texts([cfg.query])[0] if cfg.query else None
    kinds: tuple[tuple[Kind, list[Path], Any, str], ...] = (
        ("images", inputs.images, lambda path: samples.read_picture(path, size), cfg.template),
        ("audio", inputs.audio, hear.features, cfg.audio_template),
    )
    for kind, files, load, template in kinds:
        if not files:
            continue
        found = embed.files(
            kind, lambda i, files=files, load=load: load(files[i]), files, logits=False
        )
        names[kind] = [str(files[index]) for index in found.kept]
        names["skipped"] |= found.skipped.names
        _save(cfg.out / f"{kind}.npy", found.rows)
        if asked is not None:
            _show_best(names[kind], (found.rows @ asked).tolist(), f"{kind} for {cfg.query}")
        if inputs.labels:
            fits = _fits(embed, found, inputs.labels, template, kind)
            zero_shot |= dict(zip(names[kind], fits, strict=True))
    if inputs.texts:
        names["texts"] = inputs.texts
        _save(cfg.out / "texts.npy", embed.texts(inputs.texts))
    write_json(cfg.out / "embeddings.json", names)
    if zero_shot:
        write_json(cfg.out / "zero_shot.json", zero_shot)
        _show(zero_shot)
    log.info("results are in %s", cfg.out)
    return 0


def _fits(
    embed: Embedder, found: Features, labels: list[str], template: str, kind: str
) -> list[dict[str, float]]:
    """For every file the labels with their probabilities, the best first."""
    texts = embed.texts([template.replace("{}", label) for label in labels])
    pair = {"images": "image_text", "audio": "audio_text"}[kind]
    scale = embed.trained.model.logit_scale[pair].exp().item()
    shares = (scale * found.rows @ texts.T).softmax(dim=1)
    return [
        {labels[i]: round(float(row[i]), 6) for i in row.argsort(descending=True).tolist()}
        for row in shares
    ]


def _show_best(names: list[str], scores: list[float], title: str) -> None:
    """Print the names with the highest scores, cosines from -1 to 1."""
    best = sorted(zip(scores, names, strict=True), key=lambda pair: -pair[0])[:_BEST]
    sys.stdout.write(f"{title}\n" + "".join(f"  {score:6.3f}  {name}\n" for score, name in best))


def _show(zero_shot: dict[str, dict[str, float]]) -> None:
    for name, shares in zero_shot.items():
        label, share = next(iter(shares.items()))
        sys.stdout.write(f"{name}: {label} ({share:.0%})\n")


def _save(path: Path, rows: Any) -> None:
    import numpy as np

    write_atomic(path, lambda stream: np.save(stream, rows.numpy(), allow_pickle=False))


if __name__ == "__main__":
    sys.exit(launch_alone(main))
