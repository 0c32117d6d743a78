"""Put those files of BLIP-2 that hold its vision tower into blip2_weights/.

python download_weight.py                                      10 GB from huggingface.co
HF_ENDPOINT=https://hf-mirror.com python download_weight.py    the same from a mirror
python download_weight.py --source modelscope                  the same from modelscope.cn
python download_weight.py --dry-run                            the files and their sizes alone

After an interruption the same command continues. Every file is checked against its checksum.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import option, parse
from shared.launch import launch_alone

if TYPE_CHECKING:
    from shared.download import HubRepository

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
REPO_ID = "Salesforce/blip2-opt-2.7b"
REVISION = "51572668da0eb669e01a189dc22abe6088589a24"  # a commit: the same files for everybody
MODELSCOPE_REPO_ID = "goldsj/blip2-opt-2.7b"  # a user's copy there; Salesforce keeps none
MODELSCOPE_REVISION = "master"
# --------------------------------------------------------------------------------------------------

TOWER_PREFIX = "vision_model."  # of the tower's weights among those of the whole BLIP-2


@dataclass(frozen=True)
class Config:
    """Settings of the download."""

    blip_path: Path = option(
        Path(BLIP_PATH), "where the files go; train_distill.py's", aliases=("--local-dir",)
    )
    source: Literal["auto", "hub", "modelscope"] = option(
        "auto", "Hugging Face's Hub or ModelScope; auto: the Hub, unless USE_MODELSCOPE_HUB=1"
    )
    repo_id: str | None = option(
        None, f"repository, owner/name; default: {REPO_ID}, on ModelScope {MODELSCOPE_REPO_ID}"
    )
    revision: str | None = option(
        None, f"commit, branch or tag; default: {REVISION[:12]}, on ModelScope master"
    )
    endpoint: str | None = option(
        None, "mirror; default: HF_ENDPOINT (MODELSCOPE_DOMAIN), else the source's own address"
    )
    token: bool = option(True, "send your token (HF_TOKEN or login) to huggingface.co")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    dry_run: bool = option(False, "list the files and their sizes, fetch no weights")
    print_config: bool = option(False, "print the settings as JSON, stop")


def main(argv: list[str] | None = None) -> int:
    """List or fetch the files; the exit code."""
    cfg = parse(Config, argv, __doc__)
    repository = _open(cfg)
    names = ["config.json", *repository.weight_files(TOWER_PREFIX)]
    names += [name for name in ("preprocessor_config.json",) if name in repository.files]
    plan = repository.plan(names, cfg.blip_path)
    for state, files in (("there", plan.present), ("to fetch", plan.missing)):
        for file in files:
            print(f"{state:<9} {file.size:>14,} bytes  {file.name}")
    if cfg.dry_run:
        print(f"{plan.remaining:,} bytes from {repository.endpoint} would go into {cfg.blip_path}")
        return 0
    repository.fetch(plan)
    print(f"{cfg.blip_path} holds {len(names)} verified files of {repository.repo_id}")
    return 0


def _open(cfg: Config) -> "HubRepository":
    """The repository at the source that was asked for."""
    from shared import modelscope
    from shared.download import OFFICIAL_ENDPOINT, HubRepository

    if modelscope.is_wanted(cfg.source, os.environ):
        return modelscope.open_repository(
            cfg.repo_id or MODELSCOPE_REPO_ID,
            cfg.revision or MODELSCOPE_REVISION,
            endpoint=cfg.endpoint or modelscope.endpoint_of(os.environ),
        )
    return HubRepository.open(
        cfg.repo_id or REPO_ID,
        cfg.revision or REVISION,
        endpoint=cfg.endpoint or os.environ.get("HF_ENDPOINT") or OFFICIAL_ENDPOINT,
        send_token=cfg.token,
    )


if __name__ == "__main__":
    sys.exit(launch_alone(main))
