"""The whole way: preflight, environment, download, training, evaluation, report; each stage once.

    ./run_all.sh                                                all that is not done yet
    ./run_all.sh --model-size base --batch-size 8 --epochs 50   run_training.py's flags go to it
    ./run_all.sh --from training | --only evaluation | --force  begin there; that alone; all again
    ./run_all.sh --skip-download --data-root /disk/data         with data that is there
    ./run_all.sh --datasets coco                                with these data sets alone
    ./run_all.sh --demo                                         built-in data, about two minutes

Training takes the data sets that are whole; the report names the others, and the exit code is then
the download's.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import option, parse_own
from shared.errors import DONE, USER_ERROR, MissingToolError, UserError
from shared.files import read_object
from shared.launch import launch_alone
from shared.stages import Stage, StageOptions, run_stages

HERE = Path(__file__).resolve().parent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the chain; all other flags are run_training.py's."""

    data_root: Path = option(HERE / "data", "where the data sets lie or go")
    output_dir: Path = option(HERE / "outputs", "for checkpoints, logs and reports")
    datasets: tuple[str, ...] = option((), "these data sets alone; default: coco clotho audiocaps")
    skip_download: bool = option(False, "take the data that is there")
    delete_archives: bool = option(False, "delete an archive when it is unpacked")
    audiocaps_source: str = option("youtube", "youtube, hf:OWNER/NAME or local:DIRECTORY")
    demo: bool = option(False, "the built-in demo data, in multimodal/demo; no network")
    dry_run: bool = option(False, "print the commands, stop")
    stages: StageOptions = field(default_factory=StageOptions)
    typed: frozenset[str] = frozenset()  # fields the user gave; filled by parse

    def __post_init__(self) -> None:
        """Refuse what is no data set."""
        from multimodal.pairs.sources import check_names

        check_names(self.datasets)

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets that are fetched."""
        from multimodal.pairs.sources import FETCHED

        return self.datasets or FETCHED


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are not done; the exit code of the first that failed."""
    from multimodal.pairs.sources import own_weights

    cfg, flags = parse_own(Config, argv, __doc__)
    if cfg.demo:
        cfg = _with_demo(cfg)
    _check_paths(cfg)
    settings = _settings(cfg, flags)
    if settings is None:
        return USER_ERROR
    own_weights(settings["pretrained"], cfg.data_root)  # refused now if it is not there
    stages = stages_of(cfg, flags, settings)
    if cfg.dry_run:
        for stage in stages:
            words = _training(cfg, flags) if stage.name == "training" else stage.command
            if not callable(words):
                sys.stdout.write(f"{stage.name}: {shlex.join(map(str, words))}\n")
        return DONE
    # beside the outputs, which a new run moves aside
    state_dir = cfg.output_dir.with_name(f"{cfg.output_dir.name}_stages")
    options = cfg.stages
    if cfg.demo and not (options.from_stage or options.only):
        is_done = (state_dir / "report.json").exists()
        options = replace(options, force=options.force or is_done)  # one that is done begins afresh
    return run_stages(stages, options, state_dir)


def stages_of(cfg: Config, flags: list[str], settings: dict[str, Any]) -> list[Stage]:
    """The whole way in its order. flags: run_training.py's; settings: what it makes of them."""
    python, data, evaluation = sys.executable, cfg.data_root, cfg.output_dir / "evaluation"
    fetched = ["--datasets", *cfg.names, "--data-root", data]
    fetched += ["--audiocaps-source", cfg.audiocaps_source]
    fetched += ["--delete-archives"] if cfg.delete_archives else []
    fetched += [] if settings["pretrained"] == "auto" else ["--no-words"]
    demo, best = ["--demo"] if cfg.demo else [], cfg.output_dir / "checkpoints" / "best_model.pt"
    stages = [
        Stage("preflight", lambda: _preflight(cfg), is_check=True),
        Stage("environment", lambda: _environment(settings["model_size"]), is_check=True),
        Stage(
            "download",
            [python, HERE / "download_datasets.py", *(demo or fetched)],
            optional=True,
        ),
        Stage(
            "training",
            lambda: _training(cfg, flags),  # what is there is known when it was fetched
            {"flags": flags, "data": str(data), "names": cfg.datasets},
            (best,),
        ),
        Stage(
            "evaluation",
            [python, HERE / "evaluate.py", "--checkpoint", best, "--data-root", data, *demo],
            {"checkpoint": best},
            (evaluation / "evaluation.json",),
        ),
        Stage("report", lambda: _report(cfg), {"evaluated": evaluation / "evaluation.json"}),
    ]
    return [one for one in stages if one.name != "download" or not cfg.skip_download]


def _with_demo(cfg: Config) -> Config:
    demo = HERE / "demo"
    changes = {"data_root": demo / "data", "output_dir": demo / "runs" / "outputs"}
    return replace(cfg, **{n: v for n, v in changes.items() if n not in cfg.typed})


def _check_paths(cfg: Config) -> None:
    """Raise UserError for a typed directory that a stage would miss."""
    from multimodal.pairs.sources import check_audiocaps

    check_audiocaps(cfg.audiocaps_source)
    if cfg.skip_download and not cfg.demo and not cfg.data_root.is_dir():
        raise UserError(f"--data-root {cfg.data_root} is missing: leave out --skip-download")


def _training(cfg: Config, flags: list[str]) -> list[str | Path]:
    """run_training.py with the user's flags; of the data sets that were named those that are there.

    A demo is told to continue an interrupted one; left alone it would begin afresh.
    """
    command: list[str | Path] = [sys.executable, HERE / "run_training.py"]
    command += ["--data-root", cfg.data_root, "--output-dir", cfg.output_dir]
    there = [name for name in cfg.datasets if not _lacking(cfg, name)]
    command += ["--datasets", *there] if there else []
    command += ["--demo"] if cfg.demo else []
    command += ["--resume", "auto"] if cfg.demo and "--resume" not in flags else []
    return [*command, *flags]


def _settings(cfg: Config, flags: list[str]) -> dict[str, Any] | None:
    """What run_training.py makes of the flags; None, with its complaint in the log, if nothing."""
    command = [*map(str, _training(replace(cfg, datasets=()), flags)), "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("%s", done.stderr.strip())
        return None
    return json.loads(done.stdout)


def _preflight(cfg: Config) -> int:
    """Find out now what would fail after hours of downloads: disk, programs, keys.

    Raises UserError when the disk has room for none of the data sets.
    """
    from multimodal.download_datasets import check_each, from_source, need_of
    from multimodal.pairs.sources import DATA_SETS

    if cfg.skip_download or cfg.demo:
        return DONE
    chosen = [from_source(DATA_SETS[n], cfg.audiocaps_source, cfg.data_root) for n in cfg.names]
    needs = {item.name: need_of(item, cfg.data_root / item.name) for item in chosen}
    check_each(needs, cfg.data_root)
    if any(need.fetch for need in needs.values()):
        for line in _will_be_skipped(cfg):
            log.warning("%s", line)
    return DONE


def _will_be_skipped(cfg: Config) -> Iterator[str]:
    """What cannot be fetched on this machine, and what to do about it."""
    from shared.unpack import can_unpack_7z

    if "clotho" in cfg.names and not can_unpack_7z():
        yield "clotho: no program for 7z here: pip install py7zr"
    tools = [name for name in ("yt-dlp", "ffmpeg") if not shutil.which(name)]
    if "audiocaps" in cfg.names and cfg.audiocaps_source == "youtube" and tools:
        yield f"audiocaps: {' and '.join(tools)} missing; or give --audiocaps-source"
    if "voxceleb" in cfg.names and not os.environ.get("VOXCELEB_KEY"):
        yield "voxceleb: VOXCELEB_KEY is not set"


def _environment(model_size: str) -> int:
    """Warn of a GPU that is small for the model.

    Raises MissingToolError for packages that are missing, old or broken.
    """
    from multimodal.training.settings_file import MINIMUM_GB
    from shared.device import gpu_use
    from shared.tools.doctor_checks import MISSING, packages

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
    return DONE


def _report(cfg: Config) -> int:
    """Add what was skipped to the report, and say where it is."""
    from multimodal.training.report import add_section, newest

    path = newest(cfg.output_dir)
    if path is None:
        raise UserError(f"{cfg.output_dir / 'reports'} holds no report: run the training stage")
    outcomes = read_object(cfg.data_root / "downloads.json")
    left_out = [
        {"data set": name, "why": outcomes.get(name, why)}
        for name in cfg.names
        if (why := _lacking(cfg, name))
    ]
    add_section(path, "left_out", left_out)
    for row in left_out:
        log.warning("skipped: %s (%s)", row["data set"], row["why"])
    log.info("report: %s", path.with_suffix(".md"))
    return DONE


def _lacking(cfg: Config, name: str) -> str:
    """Why a data set cannot be trained on, '' when it can."""
    from multimodal.download_datasets import lacking_of

    return "" if cfg.demo else lacking_of(name, cfg.data_root)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
