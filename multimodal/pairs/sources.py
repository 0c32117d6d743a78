"""The one table of data sets: what each is for, every address, size and checksum.

COCO's addresses are plain http (the certificate of https://images.cocodataset.org does not fit its
name); the second address of a file is tried when the first fails, and the checksum tells in either
case. Where nobody publishes a size or checksum, None and '' stand. Standard library alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import UserError, did_you_mean, shortened

_COCO = "http://images.cocodataset.org"
_COCO_S3 = "https://s3.amazonaws.com/images.cocodataset.org"
_KARPATHY = "https://github.com/mehdidc/retrieval_annotations/releases/download/1.0.0"
_CLOTHO = "https://zenodo.org/records/4783391/files"  # v2.1; record 3490684 is v1
_AUDIOCAPS = "https://raw.githubusercontent.com/cdjkim/audiocaps/master/dataset"
_AUDIOCAPS_HEADER = "audiocap_id,youtube_id,start_time,caption"
_VOXCELEB = "https://cn01.mmai.io/download/voxceleb?key={key}&file="

WORDS = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"  # open_clip's ViT-B-16, on the Hub
WORDS_FILE, WORDS_BYTES = "open_clip_model.safetensors", 600_000_000  # about
RANDOM = ("random", "none")  # values of --pretrained

DOWNLOADS = "downloads"  # below a data set's directory, where archives lie


def check_names(names: tuple[str, ...]) -> None:
    """Raise ValueError for what is no data set, with the nearest name."""
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise ValueError(f"datasets: {name} is none of {', '.join(NAMES)}{near}")


SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


def check_audiocaps(source: str) -> None:
    """Raise UserError for what is no source of AudioCaps' sounds, or a directory without sounds."""
    kind, colon, rest = source.partition(":")
    if not ((kind, colon) == ("youtube", "") or (kind in ("hf", "local") and rest)):
        raise UserError(
            f"--audiocaps-source {shortened(source)}: allowed are youtube, hf:OWNER/NAME and "
            "local:DIRECTORY"
        )
    if kind != "local":
        return
    directory = Path(rest).expanduser()
    if not directory.is_dir():
        raise UserError(f"--audiocaps-source {source}: no such directory")
    names = (name for _, _, names in os.walk(directory) for name in names)
    if not any(name.lower().endswith(SOUNDS) for name in names):
        raise UserError(
            f"--audiocaps-source {source}: no sounds there; expected files named <youtube id>_"
            f"<start> and {', '.join(SOUNDS)}"
        )


@dataclass(frozen=True)
class Source:
    """A file and where it goes: `folder`, below the data set's directory.

    The other fields are shared.download.File's.
    """

    name: str
    size: int | None
    checksum: str
    urls: tuple[str, ...]
    folder: str = ""
    header: str = ""

    def path(self, root: Path) -> Path:
        """Its place below the data set's directory."""
        return root / self.folder / self.name


@dataclass(frozen=True)
class Archive:
    """An archive, in one part or several.

    holds: paths below the data set's directory → how many files or folders they hold at least, when
    all was unpacked. unpacked: bytes that takes, about.
    """

    parts: tuple[Source, ...]
    holds: dict[str, int]
    unpacked: int


@dataclass(frozen=True)
class DataSet:
    """A data set: plain files, archives in the order in which they are wanted.

    modalities: of its pairs. labels: what its labels are called, if it has any.
    """

    name: str
    modalities: tuple[str, str] = ("image", "text")
    labels: Literal["classes", "keywords"] | None = None
    files: tuple[Source, ...] = ()
    archives: tuple[Archive, ...] = ()
    clips: int = 0  # sounds that come one by one
    clip_bytes: int = 0
    needs_key: bool = False


def _coco(name: str, where: str, size: int, md5: str, holds: dict[str, int], out: int) -> Archive:
    urls = (f"{_COCO}/{where}/{name}", f"{_COCO_S3}/{where}/{name}")
    return Archive((Source(name, size, f"md5:{md5}", urls, DOWNLOADS),), holds, out)


def _notes_of(year: int) -> dict[str, int]:
    names = (f"{kind}_{half}{year}" for kind in ("captions", "instances") for half in _HALVES)
    return {f"annotations/{name}.json": 1 for name in names}


_HALVES = ("train", "val")

COCO = DataSet(
    "coco",
    ("image", "text"),
    "classes",
    files=tuple(
        Source(name, None, "", (f"{_KARPATHY}/{name}",), "karpathy")
        for name in ("coco_val_karpathy.json", "coco_test_karpathy.json")
    ),
    archives=(
        _coco(
            "annotations_trainval2017.zip", "annotations", 252_907_541,
            "f4bbac642086de4f52a3fdda2de5fa2c", _notes_of(2017), 1_100_000_000,
        ),
        _coco(
            "val2017.zip", "zips", 815_585_330,
            "442b8da7639aecaf257c1dceb8ba8c80", {"val2017": 5_000}, 830_000_000,
        ),
        _coco(
            "train2017.zip", "zips", 19_336_861_798,
            "cced6f7f71b7629ddf16f17bbcfab6b2", {"train2017": 118_287}, 19_500_000_000,
        ),
    ),
)  # fmt: skip

COCO_2014 = DataSet(
    "coco2014",
    ("image", "text"),
    "classes",
    files=COCO.files,
    archives=(
        _coco(
            "annotations_trainval2014.zip", "annotations", 252_872_794,
            "0a379cfc70b0e71301e0f377548639bd", _notes_of(2014), 1_100_000_000,
        ),
        _coco(
            "val2014.zip", "zips", 6_645_013_297,
            "a3d79f5ed8d289b7a7554ce06a5782b3", {"val2014": 40_504}, 6_700_000_000,
        ),
        _coco(
            "train2014.zip", "zips", 13_510_573_713,
            "0da8c0bd3d6becc4dcb32757491aca88", {"train2014": 82_783}, 13_600_000_000,
        ),
    ),
)  # fmt: skip


def _clotho_table(kind: str, split: str, size: int | None, md5: str) -> Source:
    name = f"clotho_{kind}_{split}.csv"
    return Source(name, size, f"md5:{md5}", (f"{_CLOTHO}/{name}?download=1",))


def _clotho_sounds(split: str, size: int | None, md5: str, count: int, out: int) -> Archive:
    name = f"clotho_audio_{split}.7z"
    source = Source(name, size, f"md5:{md5}", (f"{_CLOTHO}/{name}?download=1",), DOWNLOADS)
    return Archive((source,), {split: count}, out)


CLOTHO = DataSet(
    "clotho",
    ("audio", "text"),
    "keywords",
    files=(
        _clotho_table("captions", "development", 1_336_762, "d4090b39ce9f2491908eebf4d5b09bae"),
        _clotho_table("captions", "validation", 367_649, "5879e023032b22a2c930aaa0528bead4"),
        _clotho_table("captions", "evaluation", None, "1b16b9e57cf7bdb7f13a13802aeb57e2"),
        _clotho_table("metadata", "development", None, "170d20935ecfdf161ce1bb154118cda5"),
        _clotho_table("metadata", "validation", None, "2e010427c56b1ce6008b0f03f41048ce"),
        _clotho_table("metadata", "evaluation", None, "13946f054d4e1bf48079813aac61bf77"),
    ),
    archives=(
        _clotho_sounds(
            "validation", 1_260_701_425, "7dba730be08bada48bd15dc4e668df59", 1_045, 2_000_000_000
        ),
        _clotho_sounds(
            "evaluation", None, "4569624ccadf96223f19cb59fe4f849f", 1_045, 2_000_000_000
        ),
        _clotho_sounds(
            "development", 4_541_582_263, "c8b05bc7acdb13895bb3c6a29608667e", 3_839, 7_100_000_000
        ),
    ),
)

AUDIOCAPS = DataSet(
    "audiocaps",
    ("audio", "text"),
    files=tuple(
        Source(f"{split}.csv", None, "", (f"{_AUDIOCAPS}/{split}.csv",), "", _AUDIOCAPS_HEADER)
        for split in ("train", "val", "test")
    ),
    clips=49_838 + 495 + 975,
    clip_bytes=920_000,  # ten seconds of flac, 32 kHz
)


def _voxceleb(name: str, sha256: str) -> Source:
    return Source(name, None, f"sha256:{sha256}", (_VOXCELEB + name,), DOWNLOADS)


_VOXCELEB_DEV = (  # of parts aa to ad
    "21ec6ca843659ebc2fdbe04b530baa4f191ad4b0971912672d92c158f32226a0",
    "311d21e0c8cbf33573a4fce6c80e5a279d80736274b381c394319fc557159a04",
    "92b64465f2b2a3dc0e4196ae8dd6828cbe9ddd1f089419a11e4cbfe2e1750df0",
    "00e6190c770b27f27d2a3dd26ee15596b17066b715ac111906861a7d09a211a5",
)
_VOXCELEB_TEST = "8de57f347fe22b2c24526e9f444f689ecf5096fc2a92018cf420ff6b5b15eaea"

VOXCELEB = DataSet(
    "voxceleb",
    ("image", "audio"),
    archives=(
        Archive(
            (_voxceleb("vox1_test_wav.zip", _VOXCELEB_TEST),),
            {"wav/id10270": 1, "wav/id10309": 1},
            1_100_000_000,
        ),
        Archive(
            tuple(
                _voxceleb(f"vox1_dev_wav_parta{letter}", sha256)
                for letter, sha256 in zip("abcd", _VOXCELEB_DEV, strict=True)
            ),
            {"wav": 1_211, "wav/id10001": 1},
            39_000_000_000,
        ),
    ),
    needs_key=True,
)

DATA_SETS = {item.name: item for item in (COCO, CLOTHO, AUDIOCAPS, VOXCELEB, COCO_2014)}
NAMES = ("coco", "clotho", "audiocaps", "voxceleb")  # as directories and --datasets name them
FETCHED = NAMES[:3]  # VoxCeleb needs a key, and is fetched when named
KARPATHY_PICTURES = 5_000  # in each of the two lists


# --- the word embeddings that texts start from ----------------------------------------------------


def own_weights(choice: str, data_root: Path) -> Path | None:
    """The file that `--pretrained choice` names, or (auto) the one in <data root>/pretrained.

    None for random words, and for auto without a file there.
    Raises UserError for a file that is not there, and for auto with several.
    """
    if choice in RANDOM:
        return None
    if choice != "auto":
        path = Path(choice).expanduser().absolute()
        if not path.exists():
            raise UserError(
                f"--pretrained {shortened(choice)}: no such file; give an open_clip checkpoint, "
                "auto or random"
            )
        return path
    kinds = (".pt", ".safetensors", ".bin", ".pth")
    found = sorted(p for p in (data_root / "pretrained").glob("*") if p.suffix in kinds)
    if len(found) > 1:
        raise UserError(
            f"--pretrained auto: {data_root / 'pretrained'} holds {len(found)} files "
            f"({', '.join(path.name for path in found[:3])}); name one, or type --init random"
        )
    return found[0] if found else None


def start_of_words(choice: str, data_root: Path) -> Path | None:
    """The file that the word embeddings start from, fetched when it is not there; None: random.

    Raises UserError, which names the address, the place and what else to type.
    """
    own = own_weights(choice, data_root)
    return own if own or choice in RANDOM else fetched_words(data_root)


def fetched_words(data_root: Path, mirror: str | None = None) -> Path:
    """open_clip's file in the Hub's cache; of a mirror in <data root>/pretrained.

    Raises UserError.
    """
    from shared import hub

    try:
        if mirror:
            place = data_root / "pretrained"
            return hub.fetched_weights(f"{mirror.rstrip('/')}/{WORDS_FILE}", place)
        return hub.clip_weights({"hf_hub": f"{WORDS}/"})
    except hub.NoWeightsError as error:
        raise UserError(
            f"word embeddings: {error}; put an open_clip file into {data_root / 'pretrained'}, "
            "name one by --pretrained FILE, or begin with random ones by --init random"
        ) from None


def are_words_there(data_root: Path) -> bool:
    """Whether training finds word embeddings without a network."""
    from huggingface_hub import try_to_load_from_cache

    own = own_weights("auto", data_root)
    return own is not None or isinstance(try_to_load_from_cache(WORDS, WORDS_FILE), str)
