"""Put those files of BLIP-2 that hold its vision tower into blip2_weights/.

python download_weight.py                                      10 GB from huggingface.co
HF_ENDPOINT=https://hf-mirror.com python download_weight.py    the same from a mirror
python download_weight.py --source modelscope                  the same from modelscope.cn
python download_weight.py --dry-run                            the files and their sizes alone

After an interruption the same command continues. Every file is checked against its checksum.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
if not Path(sys.path[0], "shared").is_dir():  # the directory was copied alone
    sys.stderr.write("error: shared/ is missing beside face_distill/: copy the whole repository\n")
    sys.exit(3)

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import option, parse
from shared.errors import UserError
from shared.launch import launch_alone

if TYPE_CHECKING:
    from shared.hub import Repository

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
REPO_ID = "Salesforce/blip2-opt-2.7b"
REVISION = "51572668da0eb669e01a189dc22abe6088589a24"  # a commit: the same files for everybody
MODELSCOPE_REPO_ID = "goldsj/blip2-opt-2.7b"  # a user's copy there; Salesforce keeps none
MODELSCOPE_REVISION = "master"
# --------------------------------------------------------------------------------------------------

TOWER_PREFIX = "vision_model."  # of the tower's weights among those of the whole BLIP-2
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Config:
    """Settings of the download."""

    blip_path: Path = option(
        Path(BLIP_PATH), "where the files go; train_distill.py's", aliases=("--local-dir",)
    )
    source: Literal["auto", "hub", "modelscope"] = option(
        "auto", "Hugging Face's Hub or ModelScope; auto: the Hub, unless USE_MODELSCOPE_HUB=1"
    )
    modelscope: bool = option(False, "the same as --source modelscope")
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
    names = ["config.json", *weight_files(repository, TOWER_PREFIX)]
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


def _open(cfg: Config) -> "Repository":
    """The repository at the source that was asked for."""
    from shared import hub

    if cfg.modelscope or hub.is_wanted(cfg.source, os.environ):
        return hub.open_modelscope(
            cfg.repo_id or MODELSCOPE_REPO_ID,
            cfg.revision or MODELSCOPE_REVISION,
            endpoint=cfg.endpoint or hub.modelscope_endpoint(os.environ),
        )
    return hub.open_hub(
        cfg.repo_id or REPO_ID,
        cfg.revision or REVISION,
        endpoint=cfg.endpoint or os.environ.get("HF_ENDPOINT") or hub.OFFICIAL_ENDPOINT,
        send_token=cfg.token,
    )


def weight_files(repository: "Repository", prefix: str) -> list[str]:
    """The safetensors files with the weights whose names start with `prefix`.

    Of a sharded checkpoint: its index, and the shards that the index names for them.
    Raises UserError when there are none, or when the index is not to be trusted.
    """
    if INDEX in repository.files:
        return [INDEX, *_shards(repository, prefix)]
    if SINGLE_FILE in repository.files:
        return [SINGLE_FILE]
    pickled = sorted(n for n in repository.files if n.endswith((".bin", ".pt", ".pth")))
    has = f"only {pickled[0]}, which is pickled" if pickled else "no weights at all"
    raise UserError(
        f"{repository.repo_id} at {repository.commit} has {has}: give a repository or revision "
        f"with {SINGLE_FILE} or {INDEX}"
    )


def _shards(repository: "Repository", prefix: str) -> list[str]:
    from shared.hub import refuse_unsafe

    try:
        weight_map = json.loads(repository.read(INDEX))["weight_map"]
        shards = {shard for name, shard in weight_map.items() if name.startswith(prefix)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{INDEX} of {repository.repo_id} has no readable weight_map") from None
    if not shards:
        raise UserError(
            f"{repository.repo_id} holds no weights whose names start with {prefix!r}: check that "
            "it is the right repository"
        )
    for shard in shards:
        refuse_unsafe(shard)
    return sorted(shards)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
