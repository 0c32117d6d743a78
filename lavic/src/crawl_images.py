"""Fetch the catalogue's pictures into data/train_images and data/valid_images.

python crawl_images.py                          both, 20 at a time
python crawl_images.py --workers 64             more at a time
python crawl_images.py --train-only             those of item2meta_train.json alone
python crawl_images.py --valid-only             those of item2meta_valid.jsonl alone

Interrupted or killed, the same command goes on: what is there and decodes is not fetched again.
Pictures that could not be had are listed in data/crawl_failures.jsonl with the reason.
Exit code 0: every picture is there, or gone for good where it was; 1: another run may get more.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import option, parse
from shared.errors import UserError
from shared.launch import launch_alone
from shared.settings import Connections, Seconds

DATA_ROOT = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Config:
    """Settings of the crawl."""

    workers: Connections = option(20, "pictures fetched at a time")
    per_host: Connections = option(16, "of these, at most so many from one host")
    retries: int = option(4, "further tries after a lost connection or a busy server")
    timeout: Seconds = option(20.0, "seconds without a byte until a connection counts as lost")
    train_only: bool = option(False, "fetch the training pictures alone")
    valid_only: bool = option(False, "fetch the validation pictures alone")
    data_root: Path = option(DATA_ROOT, "where the item files lie and the pictures go")
    train_data: Path | None = option(None, "default: item2meta_train.json in the data root")
    val_data: Path | None = option(None, "default: item2meta_valid.jsonl in the data root")
    dry_run: bool = option(False, "count what is there and what is to fetch, fetch nothing")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    print_config: bool = option(False, "print the settings as JSON, stop")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.train_only and self.valid_only:
            raise ValueError("train_only and valid_only leave nothing to fetch: type one of them")

    def item_files(self) -> dict[str, Path]:
        """{split: its item file} of what is to be fetched."""
        files = {}
        if not self.valid_only:
            files["train"] = self.train_data or self.data_root / "item2meta_train.json"
        if not self.train_only:
            files["valid"] = self.val_data or self.data_root / "item2meta_valid.jsonl"
        return files


def main(argv: list[str] | None = None) -> int:
    """Check the item files, then fetch; the exit code."""
    cfg = parse(Config, argv, __doc__)
    for split, path in cfg.item_files().items():
        _check_file(split, path)
    from lavic.src.crawl import crawl

    return crawl(cfg)


def _check_file(split: str, path: Path) -> None:
    if path.is_file():
        return
    packed = path.with_name(path.name + ".zip")
    if packed.is_file():
        raise UserError(f"{path} is still packed: unzip {packed} in its directory")
    other = "--valid-only" if split == "train" else "--train-only"
    raise UserError(f"{path} is missing: put it there, or fetch the other pictures by {other}")


if __name__ == "__main__":
    sys.exit(launch_alone(main))
