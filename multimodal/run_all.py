"""The whole way: preflight, environment, download, training, evaluation, report; each stage once.

    ./run_all.sh                                                all that is not done yet
    ./run_all.sh --model-size base --batch-size 8 --epochs 50   run_training.py's flags go to it
    ./run_all.sh --from training | --only evaluation | --force  begin there; that alone; all again
    ./run_all.sh --skip-download --data-root /disk/data         with data that is there
    ./run_all.sh --datasets coco                                with these data sets alone
    ./run_all.sh --demo                                         built-in data, about two minutes

A data set that cannot be fetched stops nothing as long as pairs of one kind are there: training
takes what is whole, the report names the rest, and the exit code is the download's.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared.config import option, parse_own
from shared.errors import DONE, FAILED, MISSING_TOOL, USER_ERROR, UserError, did_you_mean
from shared.files import read_object
from shared.launch import launch_alone
from shared.stages import Stage, StageOptions, command_stage, run_stages

HERE = Path(__file__).resolve().parent
NAMES = ("coco", "clotho", "audiocaps", "voxceleb")
FETCHED = ("coco", "clotho", "audiocaps")  # VoxCeleb needs a key, and is fetched when named
MINIMUM_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # of GPU memory, as documented
_PROBE = """
import importlib, importlib.util, json
found = {"missing": [], "gpus": [], "torchaudio": ""}
for name in ("torch", "torchvision", "open_clip", "soundfile", "soxr", "msgspec", "tensorboard"):
    if importlib.util.find_spec(name) is None:
        found["missing"].append(name)
if not found["missing"]:
    import torch
    found["torch"] = torch.__version__
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found["gpus"].append([facts.name, facts.total_memory / 1e9])
if importlib.util.find_spec("torchaudio"):
    try:
        import torchaudio
    except Exception as error:
        found["torchaudio"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

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
        for name in self.datasets:
            if name not in NAMES:
                near = did_you_mean(name, NAMES)
                raise ValueError(f"datasets: {name} is none of {', '.join(NAMES)}{near}")

    @property
    def best(self) -> Path:
        """The checkpoint that is evaluated."""
        return self.output_dir / "checkpoints" / "best_model.pt"

    @property
    def state_dir(self) -> Path:
        """Where the done-markers lie: beside the outputs, which a new run moves aside."""
        return self.output_dir.with_name(f"{self.output_dir.name}_stages")


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are not done; the exit code of the first that failed."""
    cfg, rest = parse_own(Config, argv, __doc__)
    if cfg.demo:
        cfg = _with_demo(cfg)
    _check_paths(cfg)
    if cfg.dry_run:
        if _settings(cfg, rest) is None:
            return USER_ERROR
        for name, command in (("download", _download(cfg)), ("training", _training(cfg, rest)),
                              ("evaluation", _evaluation(cfg))):  # fmt: skip
            sys.stdout.write(f"{name}: {' '.join(map(str, command))}\n")
        return DONE
    options = cfg.stages
    if cfg.demo and not (options.from_stage or options.only) and _marker(cfg, "report").exists():
        options = replace(options, force=True)  # a demo that is done begins afresh
    for name in ("preflight", "environment"):  # what they look at changes by itself
        _marker(cfg, name).unlink(missing_ok=True)
    return run_stages(_stages(cfg, rest), options, cfg.state_dir)


def _with_demo(cfg: Config) -> Config:
    demo = HERE / "demo"
    changes = {"data_root": demo / "data", "output_dir": demo / "runs" / "outputs"}
    return replace(cfg, **{n: v for n, v in changes.items() if n not in cfg.typed})


def _check_paths(cfg: Config) -> None:
    """Raise UserError for a typed directory that a stage would miss."""
    from multimodal.sources import check_audiocaps

    check_audiocaps(cfg.audiocaps_source)
    if cfg.skip_download and not cfg.demo and not cfg.data_root.is_dir():
        raise UserError(f"--data-root {cfg.data_root} is missing: leave out --skip-download")


def _marker(cfg: Config, stage: str) -> Path:
    return cfg.state_dir / f"{stage}.json"


def _stages(cfg: Config, rest: list[str]) -> list[Stage]:
    fetched = _marker(cfg, "download")  # new data is reason enough to train again
    evaluated = cfg.output_dir / "evaluation" / "evaluation.json"
    stages = [
        Stage("preflight", lambda: _preflight(cfg, rest)),
        Stage("environment", lambda: _environment(cfg, rest)),
        replace(command_stage("download", _download(cfg)), optional=True),
        Stage(
            "training",
            lambda: command_stage("training", _training(cfg, rest)).run(),
            {"flags": rest, "data": str(cfg.data_root), "names": cfg.datasets, "fetched": fetched},
            (cfg.best,),
        ),
        command_stage("evaluation", _evaluation(cfg), {"checkpoint": cfg.best}, (evaluated,)),
        Stage("report", lambda: _report(cfg), {"evaluated": evaluated}),
    ]
    return [stage for stage in stages if stage.name != "download" or not cfg.skip_download]


def _script(name: str) -> list[str | Path]:
    return [sys.executable, HERE / name]


def _download(cfg: Config) -> list[str | Path]:
    if cfg.demo:
        return [*_script("download_datasets.py"), "--demo"]
    command = [*_script("download_datasets.py"), "--datasets", *(cfg.datasets or FETCHED)]
    command += ["--data-root", cfg.data_root, "--audiocaps-source", cfg.audiocaps_source]
    return [*command, "--delete-archives"] if cfg.delete_archives else command


def _training(cfg: Config, rest: list[str]) -> list[str | Path]:
    """run_training.py with the user's flags; of the data sets that were named those that are there.

    A demo is told to go on where an interrupted one stopped; left alone it would begin afresh.
    """
    command = [*_script("run_training.py"), "--data-root", cfg.data_root]
    command += ["--output-dir", cfg.output_dir]
    there = [name for name in cfg.datasets if not _lacking(cfg, name)]
    command += ["--datasets", *there] if there else []
    command += ["--demo"] if cfg.demo else []
    command += ["--resume", "auto"] if cfg.demo and "--resume" not in rest else []
    return [*command, *rest]


def _evaluation(cfg: Config) -> list[str | Path]:
    command = [*_script("evaluate.py"), "--checkpoint", cfg.best, "--data-root", cfg.data_root]
    return [*command, "--demo"] if cfg.demo else command


# --- stages that run here -------------------------------------------------------------------------


def _preflight(cfg: Config, rest: list[str]) -> int:
    """Find out now what would fail after hours: flags, disk, programs, keys."""
    settings = _settings(cfg, rest)
    if settings is None:
        return USER_ERROR
    if cfg.skip_download or cfg.demo:
        return DONE
    from multimodal import downloading
    from multimodal.sources import DATA_SETS

    chosen = cfg.datasets or FETCHED
    needs = {name: downloading.need_of(DATA_SETS[name], cfg.data_root / name) for name in chosen}
    downloading.check_each(needs, cfg.data_root)
    if not any(need.fetch for need in needs.values()):
        return DONE
    for line in _will_be_skipped(cfg, chosen):
        log.warning("%s", line)
    return DONE


def _settings(cfg: Config, rest: list[str]) -> dict[str, Any] | None:
    """What run_training.py makes of the flags; None, with its complaint in the log, if nothing."""
    command = [*map(str, _training(replace(cfg, datasets=()), rest)), "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("%s", done.stderr.strip())
        return None
    return json.loads(done.stdout)


def _will_be_skipped(cfg: Config, chosen: tuple[str, ...]) -> list[str]:
    """What cannot be fetched on this machine, and what to do about it."""
    lines = []
    if "clotho" in chosen and not _can_unpack_7z():
        lines.append("clotho: no program for 7z here: pip install py7zr")
    tools = [name for name in ("yt-dlp", "ffmpeg") if not shutil.which(name)]
    if "audiocaps" in chosen and cfg.audiocaps_source == "youtube" and tools:
        lines.append(f"audiocaps: {' and '.join(tools)} missing; or give --audiocaps-source")
    if "voxceleb" in chosen and not os.environ.get("VOXCELEB_KEY"):
        lines.append("voxceleb: VOXCELEB_KEY is not set")
    return lines


def _can_unpack_7z() -> bool:
    import importlib.util

    programs = ("7z", "7zz", "7za", "bsdtar")
    return bool(importlib.util.find_spec("py7zr") or any(map(shutil.which, programs)))


def _environment(cfg: Config, rest: list[str]) -> int:
    """Look at this interpreter's packages, at a broken torchaudio and at the GPU's memory."""
    command = [sys.executable, "-P", "-c", _PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.error("%s\n%s cannot import what is needed", done.stderr.strip(), sys.executable)
        return FAILED
    found = json.loads(done.stdout.splitlines()[-1])
    if found["missing"]:
        log.error(
            "%s lacks %s: bash %s makes an environment that has them",
            sys.executable, ", ".join(found["missing"]), HERE / "setup_environment.sh",
        )  # fmt: skip
        return MISSING_TOOL
    if found["torchaudio"]:
        log.error(
            "torchaudio is installed and does not import (%s); transformers fails because of it, "
            "and nothing here needs it: %s -m pip uninstall torchaudio",
            found["torchaudio"], sys.executable,
        )  # fmt: skip
        return MISSING_TOOL
    log.info("%s with torch %s", sys.executable, found["torch"])
    size = (_settings(cfg, rest) or {}).get("model_size", "")
    for name, gigabytes in found["gpus"]:
        if gigabytes < MINIMUM_GB.get(size, 0):
            log.warning(
                "%s has %.0f GB, and size %s is meant for %d GB and more: give a smaller "
                "--model-size or --batch-size if memory runs out",
                name, gigabytes, size, MINIMUM_GB[size],
            )  # fmt: skip
    return DONE


def _report(cfg: Config) -> int:
    """Tell the report what was left out, and the user where the report is."""
    from multimodal.report import add_section, newest

    path = newest(cfg.output_dir)
    if path is None:
        raise UserError(f"{cfg.output_dir / 'reports'} holds no report: run the training stage")
    outcomes = read_object(cfg.data_root / "downloads.json")
    left_out = [
        {"data set": name, "why": outcomes.get(name, why)}
        for name in cfg.datasets or FETCHED
        if (why := _lacking(cfg, name))
    ]
    add_section(path, "left_out", left_out)
    for row in left_out:
        log.warning("left out: %s (%s)", row["data set"], row["why"])
    log.info("report: %s", path.with_suffix(".md"))
    return DONE


def _lacking(cfg: Config, name: str) -> str:
    """Why a data set cannot be trained on, '' when it can."""
    from multimodal import downloading
    from multimodal.sources import DATA_SETS

    root = cfg.data_root / name
    forms = [form for form in DATA_SETS.values() if form.name.removesuffix("2014") == name]
    reasons = [downloading.lacking(form, root) for form in forms]
    return "" if cfg.demo or not all(reasons) else reasons[0]


if __name__ == "__main__":
    sys.exit(launch_alone(main))
