"""Put a model's repository into a directory: continued where it broke off, every file checked.

    python shared/tools/fetch_model.py OWNER/NAME DIRECTORY                        from the Hub
    HF_ENDPOINT=https://hf-mirror.com python shared/tools/fetch_model.py …         from a mirror
    python shared/tools/fetch_model.py OWNER/NAME DIRECTORY --source modelscope    from ModelScope
    python shared/tools/fetch_model.py OWNER/NAME DIRECTORY --dry-run              files and sizes

Recipes take the directory where they take a model's name. Of weights that are there as safetensors
the same in other forms stays away. USE_MODELSCOPE_HUB=1 chooses ModelScope too.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import option, parse
from shared.errors import DONE
from shared.launch import launch_alone

if TYPE_CHECKING:
    from shared.hub import Repository


@dataclass(frozen=True)
class Config:
    """Settings of the download."""

    repo_id: str = option("", "the repository, owner/name", positional=True)
    directory: Path = option(Path(), "where its files go", positional=True)
    source: Literal["auto", "hub", "modelscope"] = option(
        "auto", "Hugging Face's Hub or ModelScope; auto: the Hub, unless USE_MODELSCOPE_HUB=1"
    )
    revision: str | None = option(None, "commit, branch or tag; default: main, there master")
    endpoint: str | None = option(
        None, "mirror; default: HF_ENDPOINT (MODELSCOPE_DOMAIN), else the source's own address"
    )
    token: bool = option(True, "send your token (HF_TOKEN or login) to huggingface.co")
    dry_run: bool = option(False, "list the files and their sizes, fetch nothing")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    print_config: bool = option(False, "print the settings as JSON, stop")


def main(argv: list[str] | None = None) -> int:
    """List or fetch the files; the exit code."""
    cfg = parse(Config, argv, __doc__)
    repository = _open(cfg)
    plan = repository.plan(repository.one_copy(), cfg.directory)
    for state, files in (("there", plan.present), ("to fetch", plan.missing)):
        for file in files:
            print(f"{state:<9} {file.size:>15,} bytes  {file.name}")
    if cfg.dry_run:
        print(f"{plan.remaining:,} bytes from {repository.endpoint} would go to {cfg.directory}")
        return DONE
    repository.fetch(plan)
    count = len(plan.present) + len(plan.missing)
    print(f"{cfg.directory} holds {count} verified files of {repository.repo_id}")
    return DONE


def _open(cfg: Config) -> "Repository":
    from shared import hub

    if hub.is_wanted(cfg.source, os.environ):
        return hub.open_modelscope(
            cfg.repo_id,
            cfg.revision or hub.MODELSCOPE_REVISION,
            endpoint=cfg.endpoint or hub.modelscope_endpoint(os.environ),
        )
    return hub.open_hub(
        cfg.repo_id,
        cfg.revision or "main",
        endpoint=cfg.endpoint or os.environ.get("HF_ENDPOINT") or hub.OFFICIAL_ENDPOINT,
        send_token=cfg.token,
    )


if __name__ == "__main__":
    sys.exit(launch_alone(main))
