"""Where the CLIP weights are: the look-ups of --model_cache_dir. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import UserError
from shared.files import read_json

FILTER = Path(__file__).resolve().parent
DEFAULT_PLACES = (FILTER / "model", FILTER / "CLIP" / "model")  # looked at in this order
ARCH, TAG = "ViT-B-32-quickgelu", "openai"
OPEN_CLIP_CONFIG = "open_clip_config.json"
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
# Where transformers' own download of this model lies below a cache directory.
_TRANSFORMERS = (
    *(".", "openai/clip-vit-base-patch32", "clip-vit-base-patch32"),
    "models--openai--clip-vit-base-patch32/snapshots/*",
)


@dataclass(frozen=True)
class Source:
    """A CLIP to load. kind: open_clip's folder, transformers' folder, a weight file, or the hub."""

    kind: Literal["open_clip", "transformers", "file", "hub"]
    path: Path  # of the hub: its cache directory
    arch: str = ARCH
    tag: str = TAG

    def __str__(self) -> str:
        """For log lines."""
        names = {
            "open_clip": f"open_clip folder {self.path}",
            "transformers": f"transformers folder {self.path}",
            "file": f"{self.arch} with the weights of {self.path}",
            "hub": f"{self.arch} ({self.tag}) from the hub, cached in {self.path}",
        }
        return names[self.kind]


def find(typed: Path | None, arch: str = ARCH, tag: str = TAG) -> Source:
    """The CLIP of `--model_cache_dir typed`, or that of the default places.

    Looked up in each place M: M/open_clip_config.json, M/<arch>/open_clip_config.json, a CLIP
    folder of transformers in M, the one weight file in M; at last the hub, with M as its cache.
    Raises UserError for a folder with several weight files.
    """
    places = [typed] if typed else list(DEFAULT_PLACES)
    for place in places:
        found = _in_place(place, arch, tag)
        if found:
            return found
    return Source("hub", places[0], arch, tag)


def looked_up(place: Path, arch: str) -> str:
    """The look-ups in words, for the error when none succeeded."""
    return (
        f"{place / OPEN_CLIP_CONFIG}, {place / arch / OPEN_CLIP_CONFIG}, a CLIP folder of "
        f"transformers or one weight file ({' '.join(_WEIGHTS)}) in {place}, and the hub with "
        f"{place} as cache"
    )


def _in_place(place: Path, arch: str, tag: str) -> Source | None:
    for folder in (place, place / arch):
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return Source("open_clip", folder, arch, tag)
    for pattern in _TRANSFORMERS:
        for folder in [place] if pattern == "." else sorted(place.glob(pattern)):
            config = read_json(folder / "config.json")
            if isinstance(config, dict) and config.get("model_type") == "clip":
                return Source("transformers", folder, arch, tag)
    files = [p for p in _files(place) if p.suffix in _WEIGHTS]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(
            f"--model_cache_dir {place} holds {len(files)} weight files ({names}): keep one there, "
            f"or name a folder with {OPEN_CLIP_CONFIG}"
        )
    return Source("file", files[0], arch, tag) if files else None


def _files(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else []
