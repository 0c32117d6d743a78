"""Each product's picture as vectors of the frozen vision tower: computed once, kept on the disk.

    vectors = prepare(items, images, Tower(model, processor), cache, world, workers=4)
    matrix, views = vectors.of(["B000000000", …])

Kept under two names: a directory for the weights of tower, projector and adapter, and in it each
picture by its content. Another adapter or another picture never meets an old vector.
V views of the pictures asked for, D the language model's width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lavic.src.vision.model import cls_vectors, core_of, picture_views
from shared import distributed
from shared.distributed import World
from shared.errors import UserError
from shared.files import check_regular, read_bytes, remove_stale_temporaries, write_atomic
from shared.images import read_rgb
from shared.loader import make_eval_loader
from shared.progress import Share

log = logging.getLogger(__name__)

Beat = Callable[[str, int, int], object]  # what is done, how much of it, of how much

_VIEWS_AT_ONCE = 40  # that go through the tower together
_PICTURES_A_FILE = 256  # what a kill costs at most


class ItemVectors:
    """The vectors of all products that have a picture.

    views: {item id: number of its views}. without: {item id: why it has no picture}.
    """

    def __init__(self, vectors: dict[str, Tensor], without: dict[str, str]) -> None:
        self._vectors, self.without = vectors, without
        self.views = {item: len(found) for item, found in vectors.items()}

    def of(self, items: Sequence[str]) -> tuple[Tensor, list[int]]:
        """(V, D) of these items one after another, and how many views each has."""
        views = [self.views[item] for item in items]
        if not items:
            return torch.zeros(0, 0), views
        return torch.cat([self._vectors[item] for item in items]), views


@dataclass(frozen=True)
class Tower:
    """What makes vectors of pictures: the model with its vision adapter, and its processor."""

    model: nn.Module
    processor: Any

    def key(self) -> str:
        """The name of these weights, this precision and this way of preparing pictures."""
        core, digest = core_of(self.model), hashlib.blake2b(digest_size=12)
        digest.update(self.processor.image_processor.to_json_string().encode())
        for part in (core.vision_tower, core.multi_modal_projector):
            for name, parameter in part.named_parameters():
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                flat = parameter.detach().cpu().contiguous().flatten()
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
        return digest.hexdigest()

    @torch.no_grad()
    def vectors(self, views: list[Tensor]) -> list[Tensor]:
        """(views, D) on the CPU of each picture's (views, 3, S, S), in the model's precision."""
        device = next(self.model.parameters()).device
        made = cls_vectors(self.model, torch.cat(views).to(device)).cpu()
        return list(made.split([len(each) for each in views]))


def prepare(
    items: Iterable[str],
    images: Path,
    tower: Tower,
    cache: Path,
    world: World,
    *,
    workers: int,
    beat: Beat | None = None,
) -> ItemVectors:
    """The vectors of the items whose picture {id}_0.jpg is in `images`; every rank calls it.

    What `cache` lacks is computed, each rank its share, and kept there. Items without a picture,
    or with one that cannot be decoded, have no vectors: the result says why. beat: is told how far
    it is; without one the log is.
    Raises UserError when not one has a picture.
    """
    digests, without = _digests(sorted(set(items)), images)
    paths = {digest: images / f"{item}_0.jpg" for item, digest in digests.items()}
    store = _Store(cache / tower.key())
    vectors = store.read(paths)
    beat, missing = beat or Share().text, {d: p for d, p in paths.items() if d not in vectors}
    bad = _fill(store, tower, missing, world, workers, beat)
    vectors |= store.read({d: p for d, p in paths.items() if d not in vectors and d not in bad})
    elsewhere = {d: p for d, p in paths.items() if d not in vectors and d not in bad}
    bad |= _fill(
        store, tower, elsewhere, World(device=world.device), workers, beat
    )  # another host's
    vectors |= store.read(elsewhere)
    without |= {item: bad[digest] for item, digest in digests.items() if digest in bad}
    _report(without, len(digests.keys() | without.keys()), images, world)
    return ItemVectors({i: vectors[d] for i, d in digests.items() if d in vectors}, without)


class _Store:
    """Files of vectors in one directory, each named after the pictures in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made: {error.strerror}; give --cache") from None

    def read(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """{digest: vectors (views, D)} of the wanted pictures that are there.

        Damaged files do not count.
        """
        from safetensors import SafetensorError, safe_open

        wanted, found = set(wanted), dict[str, Tensor]()
        for path in sorted(self._directory.glob("*.safetensors")) if wanted else ():
            try:
                check_regular(path)
                with safe_open(str(path), framework="pt") as file:
                    names = json.loads(file.metadata()["pictures"])
                    if wanted.isdisjoint(names):
                        continue
                    counts = file.get_tensor("views").tolist()
                    parts = file.get_tensor("vectors").split(counts)
                    pairs = list(zip(names, parts, strict=True))
            except (
                SafetensorError,
                OSError,
                LookupError,
                TypeError,
                ValueError,
                RuntimeError,
            ) as error:
                log.warning("vectors passed over, they are computed again: %s (%s)", path, error)
                continue
            found |= {name: part.clone() for name, part in pairs if name in wanted}
        return found

    def write(self, vectors: dict[str, Tensor]) -> None:
        """Keep the vectors (views, D) of some pictures, in one step."""
        from safetensors.torch import save

        names = sorted(vectors)
        tensors = {
            "vectors": torch.cat([vectors[name] for name in names]),
            "views": torch.tensor([len(vectors[name]) for name in names]),
        }
        content = save(tensors, metadata={"pictures": json.dumps(names)})
        name = hashlib.blake2b("".join(names).encode(), digest_size=8).hexdigest()

        def put(stream: Any) -> None:
            stream.write(content)

        write_atomic(self._directory / f"{name}.safetensors", put)

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        remove_stale_temporaries(self._directory)


class _Pictures(Dataset[Any]):
    """(digest, views) of each picture; in place of views the reason when there are none."""

    def __init__(self, paths: dict[str, Path], processor: Any) -> None:
        self._paths, self._processor = list(paths.items()), processor

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        digest, path = self._paths[index]
        try:
            return digest, picture_views(self._processor, read_rgb(path))
        except ValueError as error:
            return digest, str(error)


def _fill(
    store: _Store,
    tower: Tower,
    missing: dict[str, Path],
    world: World,
    workers: int,
    beat: Beat,
) -> dict[str, str]:
    """Compute and keep this rank's share of what is missing; {digest: why it cannot be} of all."""
    bad: dict[str, str] = {}
    if distributed.any_rank(bool(missing), world):
        if world.is_main:
            log.info("%d pictures go through the vision tower, once", len(missing))
            store.clean()
        made: dict[str, Tensor] = {}
        for digests, views in _groups(missing, tower.processor, world, workers, bad, beat):
            made |= zip(digests, tower.vectors(views), strict=True)
            if len(made) >= _PICTURES_A_FILE:
                store.write(made)
                made = {}
        if made:
            store.write(made)
        for others in distributed.gather_objects(bad, world):
            bad = bad | others
    return bad


def _groups(
    missing: dict[str, Path],
    processor: Any,
    world: World,
    workers: int,
    bad: dict[str, str],
    beat: Beat,
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Digests and views of some pictures at a time; the reasons of the others go into `bad`."""
    pictures = _Pictures(missing, processor)
    loader = make_eval_loader(pictures, 8, world, workers=workers, collate=list)
    digests: list[str] = []
    views: list[Tensor] = []
    pairs = (pair for batch in loader for pair in batch)
    for done, (digest, found) in enumerate(pairs):
        beat("vectors: picture", done, -(-len(missing) // world.size))
        if isinstance(found, str):
            bad[digest] = found
            continue
        digests.append(digest)
        views.append(found)
        if sum(map(len, views)) >= _VIEWS_AT_ONCE:
            yield digests, views
            digests, views = [], []
    if views:
        yield digests, views


def _digests(items: list[str], images: Path) -> tuple[dict[str, str], dict[str, str]]:
    """{item: name of its picture's content}, and {item: why there is none}."""

    def look(item: str) -> tuple[str, str]:
        path = images / f"{item}_0.jpg"
        if path.parent != images or not path.is_file():
            return "", "missing"
        try:
            return hashlib.blake2b(read_bytes(path), digest_size=16).hexdigest(), ""
        except OSError as error:
            return "", f"cannot be read: {error.strerror}"

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(items, pool.map(look, items), strict=True))
    digests = {item: digest for item, (digest, _) in found.items() if digest}
    return digests, {item: reason for item, (_, reason) in found.items() if reason}


def _report(without: dict[str, str], total: int, images: Path, world: World) -> None:
    """Say how many candidates have no picture; refuse when none has one."""
    if len(without) == total:
        raise UserError(
            f"{images} holds not one usable picture of the {len(without)} candidates: fetch them "
            "with src/crawl_images.py, or name the right folder with --image-dir"
        )
    if without and world.is_main:
        reasons = ", ".join(f"{n} x {r}" for r, n in Counter(without.values()).most_common(3))
        log.warning(
            "%d of %d candidates (%.1f %%) have no usable picture and go by their title alone: "
            "%s; the first are %s",
            len(without),
            total,
            100 * len(without) / total,
            reasons,
            ", ".join(list(without)[:3]),
        )
