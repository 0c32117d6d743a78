"""What the data sets have in common: counts, damaged files, pictures, captions, tables, batches."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from multimodal.pairs import audio
from shared import images
from shared.errors import MissingToolError, UserError
from shared.files import open_regular, read_bytes
from shared.images import Skipped

log = logging.getLogger(__name__)

Sample = dict[str, Tensor]
T = TypeVar("T")

NUM_LABELS = 80  # width of `labels`
SPLITS = ("train", "val", "test")
MOST_BAD = 0.05  # share of the files that are there which may be damaged
_LATE = 0.2  # seconds that a header may promise too many: padding of MP3's frames
_READERS = 8  # threads that look into files; they wait for the disk


@dataclass(frozen=True)
class Counts:
    """How many items a split has: listed, found and usable, captions of these, and why not more.

    split: the name of the split for people, as "Karpathy test".
    """

    data_set: str
    split: str
    expected: int
    found: int
    captions: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """One line for logs."""
        why = "; ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        return f"{self.data_set} {self.split}: {self.found} of {self.expected}" + (
            f" ({why})" if why else ""
        )


def usable(
    listed: Sequence[T],
    path_of: Callable[[T], Path | None],
    problem: Callable[[Path], str | None],
    *,
    of: tuple[str, str],
    what: str,
    where: Path,
    form: str,
    limit: int | None = None,
) -> tuple[list[T], Counts]:
    """The items whose files are there and readable, `limit` of them spread, and all in numbers.

    path_of: the item's file, None where there is none. problem: why a file cannot be used.
    of: data set and split, for people. what, where: the items, and what lists them. form: how
    their files are named. Files may be missing: those that are there are used, and the log says
    how many these are. Raises UserError when none is there, or more than a twentieth is damaged.
    """
    paths = [path_of(item) for item in listed]
    with ThreadPoolExecutor(_READERS) as threads:
        problems = list(
            threads.map(lambda path: problem(path) if path and path.exists() else "missing", paths)
        )
    good = [item for item, why in zip(listed, problems, strict=True) if why is None]
    missing = problems.count("missing")
    if not listed:
        raise UserError(
            f"{where} lists no {what} of {' '.join(of)}: check that it is the right one"
        )
    if missing == len(listed):
        raise UserError(
            f"none of the {missing} {what} listed in {where} is there: expected {form}; "
            "download_datasets.py fetches them, or give the directory that holds them by "
            "--data-root"
        )
    if missing:
        log.warning(
            "%s: %d of %d %s of %s are there (%.0f %%), and these are used; the others are missing",
            where, len(listed) - missing, len(listed), what, " ".join(of),
            100 * (1 - missing / len(listed)),
        )  # fmt: skip
    bad = Skipped(what)
    for path, why in zip(paths, problems, strict=True):
        if why not in (None, "missing"):
            bad.add(str(path), str(why))
    bad.refuse_above(MOST_BAD, len(listed) - missing)
    captions = sum(len(getattr(item, "captions", ())) for item in good)
    skipped = ({"missing": missing} if missing else {}) | bad.reasons
    return _limited(good, limit), Counts(*of, len(listed), len(good), captions, skipped)


class Replacing:
    """Files that turn out damaged while training: named, counted, and another item in their place.

    The place of a batch has to be filled, on every rank alike; `replaced` in the sample says that
    it holds the next item. Counts are of this process; loader workers keep their own.
    """

    def __init__(self, data_set: str, what: str) -> None:
        self._name, self.skipped = data_set, Skipped(what)

    def load(self, index: int, total: int, load: Callable[[int], Sample]) -> Sample:
        """The sample of `index`, or of the next that gives one, with `replaced` added.

        Raises IndexError for an index outside, and UserError when so many are damaged that the set
        is not what it should be.
        """
        index, name = range(total)[index], self._name
        for step in range(total):
            try:
                sample = load((index + step) % total)
            except ValueError as error:
                self.skipped.add(f"{name} {(index + step) % total}", str(error))
                # the first few prove nothing of a small set
                if self.skipped.count > 3:
                    self.skipped.refuse_above(MOST_BAD, total)
                continue
            return sample | {"replaced": torch.tensor(step > 0)}
        raise UserError(f"none of the {total} {name} files can be read: see the log")


class Hearing(TypedDict, total=False):
    """How sounds are read, as `Sounds` takes it."""

    clip_seconds: float
    eval_seconds: float
    cache: Path | None


class Sounds:
    """How clips become features (T, 80): a random part in training, else all up to a limit.

    clip_seconds: of the part; of a shorter clip all. eval_seconds: at most, from the beginning.
    cache: directory for whole clips' features; the part is then cut from these.
    """

    def __init__(
        self,
        *,
        train: bool,
        clip_seconds: float = 10.0,
        eval_seconds: float = 30.0,
        cache: Path | None = None,
    ) -> None:
        if clip_seconds <= 0 or eval_seconds <= 0:
            raise UserError(f"clips of {min(clip_seconds, eval_seconds)} seconds: give more than 0")
        self._is_random, self._seconds = train, clip_seconds if train else eval_seconds
        self._cache = audio.FeatureCache(cache) if cache else None
        self._cut = set[Path]()  # files shorter than their headers say

    def features(self, path: Path) -> Tensor:
        """Features of the clip, float32 (T, 80). Raises audio.AudioError."""
        if self._cache is not None:
            whole = self._cache.features(path)
            wanted = round(self._seconds * audio.FRAMES_PER_SECOND)
            start = int(self._start(len(whole) - wanted))
            return whole[start : start + wanted]
        if not self._is_random:
            return audio.log_mel(audio.read_waveform(path, 0.0, self._seconds))
        length = audio.length_of(path)
        start = self._start(length - self._seconds)
        waveform = audio.read_waveform(path, start, self._seconds)
        wanted = min(self._seconds, length - start)
        if start and len(waveform) < (wanted - _LATE) * audio.SAMPLE_RATE:
            if path not in self._cut:
                self._cut.add(path)
                log.warning(
                    "%s: the sound ends before its header says; used as far as it goes (%d such)",
                    path, len(self._cut),
                )  # fmt: skip
            whole = audio.read_waveform(path)
            first = int(
                self._start(len(whole) / audio.SAMPLE_RATE - self._seconds) * audio.SAMPLE_RATE
            )
            waveform = whole[first : first + round(self._seconds * audio.SAMPLE_RATE)]
        return audio.log_mel(waveform)

    def _start(self, room: float) -> float:
        return float(torch.rand(())) * room if self._is_random and room > 0 else 0.0


def sound_problem(path: Path) -> str | None:
    """Why the file gives no sound, or None; its header alone is read."""
    try:
        return None if audio.length_of(path) > 0 else "the file holds no sound"
    except audio.AudioError as error:
        return str(error).removeprefix(f"{path}: ")


def pick(captions: Sequence[str], train: bool) -> str:
    """One of an item's captions: a random one while training, else the first."""
    number = int(torch.randint(len(captions), ())) if train and len(captions) > 1 else 0
    return captions[number]


def text_of(caption: str) -> Sample:
    """`input_ids` (77) and `attention_mask` (77) of a caption."""
    ids, mask = tokenise([caption])
    return {"input_ids": ids[0], "attention_mask": mask[0]}


def multi_hot(numbers: Iterable[int]) -> Tensor:
    """float32 (80) with ones at `numbers`."""
    row = torch.zeros(NUM_LABELS)
    row[list(numbers)] = 1.0
    return row


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch: every entry stacked; `audio` filled up to the longest, with `audio_mask` (B, T).

    The mask is true where a frame is sound.
    """
    batch = {
        name: torch.stack([sample[name] for sample in samples])
        for name in samples[0]
        if name != "audio"
    }
    if "audio" in samples[0]:
        clips = [sample["audio"] for sample in samples]
        lengths = torch.tensor([len(clip) for clip in clips])
        batch["audio"] = pad_sequence(clips, batch_first=True)
        batch["audio_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def checked_split(split: str) -> str:
    """`split`, one of train, val and test. Raises UserError for another."""
    if split not in SPLITS:
        raise UserError(f"split {split!r}: allowed are {', '.join(SPLITS)}")
    return split


def _limited(items: list[T], limit: int | None) -> list[T]:
    """`limit` items, spread over the list; None means all. Raises UserError below 1."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise UserError(f"limit {limit}: at least 1 item is needed")
    return [items[place * len(items) // limit] for place in range(limit)]


# --- pictures -------------------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
_SMALLEST_CROP = 0.8  # of the area: captions tell where things are, and labels that they are there


def read_picture(path: Path, size: int) -> Tensor:
    """The middle square of the picture, float32 (3, size, size). Raises ValueError."""
    from torchvision.transforms.v2 import functional as transforms

    picture = images.read_rgb(path)
    short = min(picture.shape[1:])
    square = transforms.center_crop(picture, [short, short])
    return normalise(_resized(square, size))


def read_cropped_picture(path: Path, size: int) -> Tensor:
    """A random square of the picture, float32 (3, size, size); never mirrored. Raises ValueError.

    A square, as evaluation takes one: shapes keep their proportions. It covers 80 to 100 % of the
    area of the largest square; size and position come from torch's generator.
    """
    picture = images.read_rgb(path)
    height, width = picture.shape[1:]
    area, across, down = torch.rand(3).tolist()
    scale = (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * area) ** 0.5
    side = max(1, round(min(height, width) * scale))
    top, left = round(down * (height - side)), round(across * (width - side))
    return normalise(_resized(picture[:, top : top + side, left : left + side], size))


def normalise(pixels: Tensor) -> Tensor:
    """Pixels uint8 (…, 3, H, W) as float32 of mean about 0 and deviation about 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous()


def _resized(picture: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    mode = transforms.InterpolationMode.BICUBIC
    return transforms.resize(picture, [size, size], interpolation=mode, antialias=True)


def picture_problem(path: Path) -> str | None:
    """Why the file is no picture, or None; of a JPEG only the beginning and the end are read.

    A file that is cut short, empty or something else is found, damage in the middle is not.
    """
    try:
        with open_regular(path) as stream:
            head = stream.read(2)
            stream.seek(-2, 2)
            tail = stream.read(2)
    except OSError:
        return images.problem(path)
    return None if (head, tail) == (b"\xff\xd8", b"\xff\xd9") else images.problem(path)


# --- captions -------------------------------------------------------------------------------------

CONTEXT = 77  # token ids a caption
VOCABULARY = 49_408
END = VOCABULARY - 1  # ends every caption; the largest id


def tokenise(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (N, 77) int64 and mask (N, 77) bool of English captions; longer ones are cut at the end.

    The mask is true up to and with the end token. It does not ask for ids other than 0: the padding
    is 0, and so is the token of an exclamation mark.
    """
    ids = _tokenizer()(list(texts), context_length=CONTEXT)
    return ids, mask_of(ids)


def mask_of(ids: Tensor) -> Tensor:
    """Which of the ids (N, L) belong to the caption: bool (N, L), from the place of the end."""
    return torch.arange(ids.shape[1]) <= (ids == END).int().argmax(1, keepdim=True)


def caption_of(ids: Tensor) -> str:
    """The caption of `input_ids` (77)."""
    text = _tokenizer().decode(ids.tolist())
    return text.partition("<start_of_text>")[2].partition("<end_of_text>")[0].strip()


@functools.cache
def _tokenizer() -> Any:
    """The tokenizer, from its file alone: the whole of open_clip takes four seconds to import."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise MissingToolError("captions need open_clip's tokenizer: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    name = "open_clip_tokenizer_alone"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


# --- tables ---------------------------------------------------------------------------------------


def read_table(path: Path, encoding: str, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, each with its line number.

    Raises UserError, with file and line, for one that is missing, in another encoding, without
    these columns or with a row of another length.
    """
    try:
        text = read_bytes(path).decode(encoding)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): download_datasets.py fetches it"
        ) from None
    except UnicodeDecodeError as error:
        line = read_bytes(path)[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not {encoding}; fetch the file again") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None)
    lacking = [column for column in columns if column not in _header(reader, path)]
    if lacking:
        raise UserError(f"{path} has no column {', '.join(lacking)}: is it the right file?")
    rows = []
    try:
        for row in reader:
            if "" in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: another number of columns")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; fetch the file again") from None
    return rows


def _header(reader: csv.DictReader[str], path: Path) -> list[str]:
    try:
        return list(reader.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}; fetch the file again") from None
