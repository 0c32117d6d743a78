"""What run_all looks at before hours of downloads and training: disk, programs, packages, GPUs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from multimodal import downloading
from multimodal.sources import DATA_SETS
from shared.device import gpu_use
from shared.errors import MissingToolError
from shared.tools.doctor_checks import MISSING, packages
from shared.unpack import can_unpack_7z

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
MINIMUM_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # of GPU memory, as documented


def check_downloads(
    names: Sequence[str], data_root: Path, audiocaps_source: str, *, has_key: bool
) -> None:
    """Warn of data sets that cannot be fetched here; has_key: VoxCeleb's key is set.

    Raises UserError when the disk has room for none of them.
    """
    needs = {name: downloading.need_of(DATA_SETS[name], data_root / name) for name in names}
    downloading.check_each(needs, data_root)
    if any(need.fetch for need in needs.values()):
        for line in _will_be_skipped(names, audiocaps_source, has_key):
            log.warning("%s", line)


def _will_be_skipped(names: Sequence[str], audiocaps_source: str, has_key: bool) -> Iterator[str]:
    """What cannot be fetched on this machine, and what to do about it."""
    if "clotho" in names and not can_unpack_7z():
        yield "clotho: no program for 7z here: pip install py7zr"
    tools = [name for name in ("yt-dlp", "ffmpeg") if not shutil.which(name)]
    if "audiocaps" in names and audiocaps_source == "youtube" and tools:
        yield f"audiocaps: {' and '.join(tools)} missing; or give --audiocaps-source"
    if "voxceleb" in names and not has_key:
        yield "voxceleb: VOXCELEB_KEY is not set"


def check_environment(model_size: str) -> None:
    """Warn of a GPU that is small for the model.

    Raises MissingToolError for packages that are missing, old or broken.
    """
    lacking = [check for check in packages(HERE.parent, [HERE.name]) if check.state == MISSING]
    if lacking:
        told = "; ".join(f"{check.name}: {check.value} ({check.command})" for check in lacking)
        script = HERE / "setup_environment.sh"
        raise MissingToolError(f"{told}; bash {script} makes an environment that has all")
    least = MINIMUM_GB.get(model_size, 0)
    for gpu in gpu_use():
        gigabytes = gpu["total_bytes"] / 1e9
        if gigabytes < least:
            log.warning(
                "GPU %d has %.0f GB, and size %s is meant for %d GB and more: give a smaller "
                "--model-size or --batch-size if memory runs out",
                gpu["index"], gigabytes, model_size, least,
            )  # fmt: skip


def lacking(name: str, data_root: Path) -> str:
    """Why a data set cannot be trained on, '' when it can; either year of COCO will do."""
    forms = [form for form in DATA_SETS.values() if form.name.removesuffix("2014") == name]
    reasons = [downloading.lacking(form, data_root / name) for form in forms]
    return reasons[0] if all(reasons) else ""
