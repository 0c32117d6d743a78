r"""Train an ArcFace image retriever on DeepFashion In-shop.

python run_scripts/run_arcface.py --launcher pytorch --nproc-per-node 4 \
    --config config/arcface/resnet50-arcface_8xb32_inshop.py --data-root DIR
python run_scripts/run_arcface.py --cfg-options train_cfg.max_epochs=10 …
python run_scripts/run_arcface.py --config … --resume          continue the run in its work dir
python run_scripts/run_arcface.py --demo                       built-in data, on any machine
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs
from shared.config import ProcessOptions, RunOptions, dashed, free, option, parse, parse_known
from shared.device import present_gpus, visible_gpus
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size

if TYPE_CHECKING:
    from arcface.run_settings import Settings

RECIPE = Path(__file__).resolve().parents[1]
CONFIG = "config/arcface/resnet50-arcface_8xb32_inshop.py"
DEMO_CONFIG = "config/arcface/resnet18-arcface_demo.py"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the command line; those of the training stand in the configuration file."""

    config: str | None = option(
        None, f"configuration file, looked up here, then in arcface/; default: {CONFIG}"
    )
    cfg_options: tuple[str, ...] = option(
        (), "key=value pairs over the file, as train_cfg.max_epochs=10"
    )
    data_root: Path | None = option(None, "the inshop directory, for every data set at once")
    run_dir: Path | None = free(
        None,
        "where everything goes; default: arcface/work_dirs/<configuration's name>",
        aliases=("--work-dir",),
    )
    launcher: Literal["pytorch", "none", "slurm"] = free(
        "pytorch",
        "pytorch: a process a GPU, started here; none: one process; slurm: started by srun",
    )
    validate: bool = free(True, "queries against the gallery after epochs")
    auto_scale_lr: bool = option(
        False, "scale the learning rate by the total batch size (auto_scale_lr.enable=True)"
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "the encoder's weights to begin with: init_cfg's, or none"
    )
    strict_cfg: bool = free(False, "refuse unknown settings in place of naming them")
    pin_memory: bool = free(True, "accepted; memory is pinned where there is a GPU")
    persistent_workers: bool = free(True, "accepted; loader workers start with each epoch")
    estimate: bool = free(False, "print how much memory a process needs, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(resume="never"))


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    _check_launcher(cfg)
    if cfg.estimate:
        sys.stdout.write(_estimate(cfg) + "\n")
        return 0
    from arcface import run_settings

    if cfg.run.demo:
        cfg = _with_demo(cfg)
    settings = _settings(cfg)
    stored = settings.for_run(_run_options(cfg, settings), cfg.init)
    run_dir = _run_dir(cfg)
    remarks = run_settings.check_data(settings)
    if not cfg.run.is_explicit_resume:  # which takes its weights from the checkpoint
        run_settings.check_weights(settings, cfg.init)
    for remark in settings.remarks:
        log.warning(remark)
    if cfg.run.resume in ("auto", "latest"):
        for change in run_settings.changes(run_dir, settings.configuration):
            log.info("not as in the run there: %s", change)
    if cfg.run.dry_run:
        for remark in remarks:  # which a run makes when it opens the lists
            log.warning(remark)
        sys.stdout.write(_plan(settings, run_dir) + "\n")
        return 0
    os.close(open_lock(run_dir))  # better refused now than after torch was loaded
    from arcface import memory
    from arcface.training import Job, train
    from shared.memory import explained_out_of_memory

    def estimate() -> str:
        return memory.text(settings.recipe, stored.run.amp, world_size(), Path.cwd())

    with explained_out_of_memory(estimate):
        return train(Job(settings, stored, run_dir, cfg.validate))


def _estimate(cfg: Config) -> str:
    """How much memory the configured training takes; its data need not be there."""
    from arcface import memory

    config = cfg.config or (DEMO_CONFIG if cfg.run.demo else CONFIG)
    recipe = memory.recipe_of(config, cfg.cfg_options, Path.cwd())
    amp = cfg.run.amp if "amp" in cfg.run.typed else recipe.amp or cfg.run.amp
    return memory.text(recipe, amp, world_size(), Path.cwd())


def _check_launcher(cfg: Config) -> None:
    if cfg.launcher == "slurm" and "RANK" not in os.environ:
        raise UserError(
            "--launcher slurm is for processes that srun started (SLURM_PROCID is not set): type "
            "srun python run_scripts/run_arcface.py …, or leave --launcher out"
        )
    if cfg.launcher == "none" and cfg.run.processes.nnodes > 1:
        raise UserError("--launcher none is one process: leave out --nnodes, or --launcher none")


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its configuration and paths where none were typed."""
    from arcface import demo

    root = RECIPE / "demo"
    paths = demo.build(root)
    names_data = cfg.data_root or any(".data_root=" in text for text in cfg.cfg_options)
    config = cfg.config or DEMO_CONFIG
    return replace(
        cfg,
        config=config,
        data_root=cfg.data_root if names_data else paths.data_root,
        run_dir=cfg.run_dir or root / "runs" / Path(config).stem,
    )


def _settings(cfg: Config) -> "Settings":
    """The checked recipe; of an explicit --resume PATH the run's own, unless a file is typed."""
    from arcface import run_settings

    overrides = run_settings.Overrides(
        cfg.cfg_options, cfg.data_root, scale_lr=cfg.auto_scale_lr, strict=cfg.strict_cfg
    )
    if not cfg.run.is_explicit_resume:
        return run_settings.load(cfg.config or CONFIG, overrides, Path.cwd())
    written = run_settings.directory_of(Path(cfg.run.resume))
    if cfg.config and "config" in cfg.run.typed:
        settings = run_settings.load(cfg.config, overrides, Path.cwd())
    else:
        settings = run_settings.load_stored(written, overrides, Path.cwd())
    before = run_settings.stored_configuration(written)
    run_settings.refuse_changes(before, settings.configuration, cfg.run.resume)
    return settings


def _run_options(cfg: Config, settings: "Settings") -> RunOptions:
    """The flags of the run, with the configuration's seed, precision and interval where untyped."""
    recipe, run = settings.recipe, cfg.run
    changes: dict[str, Any] = {}
    if "log_every" not in run.typed:
        changes["log_every"] = recipe.log_interval
    if not run.is_explicit_resume:  # which has taken them from the run
        if "seed" not in run.typed and recipe.seed is not None:
            changes["seed"] = recipe.seed
        if "amp" not in run.typed and recipe.amp:
            changes["amp"] = recipe.amp
    return replace(run, **changes)


def _run_dir(cfg: Config) -> Path:
    name = Path(cfg.config or CONFIG).stem
    return cfg.run_dir or RECIPE / "work_dirs" / name


def _plan(settings: "Settings", run_dir: Path) -> str:
    recipe, processes = settings.recipe, world_size()
    total = recipe.train.batch_size * processes
    return (
        f"{recipe.epochs} epochs of {settings.roots[recipe.train.name]}, {total} pictures a step ="
        f" {processes} process(es) x {recipe.train.batch_size}, learning rate "
        f"{recipe.lr_for(total):g}; everything goes to {run_dir}"
    )


# --- how many processes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """What decides how the processes are started."""

    launcher: str = option("pytorch", "")
    device: str = option("auto", "")
    demo: bool = option(False, "")
    processes: ProcessOptions = field(default_factory=ProcessOptions)


def start() -> int:
    """Settle how many processes there are, then run `main` in them; the exit code."""
    argv = dashed(sys.argv[1:])
    sys.argv[1:] = settle_processes(argv, os.environ)
    typed_count = any(word.startswith("--nproc") for word in argv)
    if "--demo" in argv and present_gpus() == 0 and not typed_count:
        # two minutes on two cores need both; threads that wait asleep take none from each other
        os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return launch(main, processes_that_fit)


def settle_processes(argv: list[str], environ: MutableMapping[str, str]) -> list[str]:
    """`argv` with a number of processes that can be had; under srun `environ` is set in its place.

    --nproc-per-node, which the documents give for their machines, is lowered to the visible GPUs;
    --nproc, typed for this machine, is left to the launcher to check.
    """
    try:
        flags = parse_known(_Start, argv)
    except UserError:
        return argv  # the launcher says what is wrong with it
    if flags.launcher == "slurm":
        _take_over_from_slurm(flags.processes, environ)
    if "RANK" in environ or any(flag in argv for flag in ("-h", "--help")):
        return argv
    wanted = flags.processes.nproc
    if flags.launcher == "none":
        possible, why = 1, "--launcher none is one process"
    else:
        visible = 0 if flags.device == "cpu" else visible_gpus(environ, present_gpus())
        possible, why = max(1, visible), f"{visible or 'no'} GPU(s) are visible"
        if not any(word.partition("=")[0] == "--nproc-per-node" for word in argv):
            return argv
    if wanted is not None and wanted > possible:
        logs.say(
            f"warning: {wanted} processes were asked for, {why}: going on with {possible}; the "
            "learning rate follows where auto_scale_lr is on"
        )
    elif flags.launcher != "none":
        return argv
    return [*argv, "--nproc", str(min(possible, wanted or possible))]


def _take_over_from_slurm(flags: ProcessOptions, environ: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from those of srun; nothing without them."""
    if "SLURM_PROCID" not in environ:
        return
    local = int(environ.get("SLURM_LOCALID", 0))
    visible = visible_gpus(environ, present_gpus())
    one_each = visible == 1  # srun --gpus-per-task=1 shows each process its own GPU as number 0
    job = environ.get("SLURM_JOB_ID", "0")
    port = 10_000 + int(job) % 20_000 if job.isdigit() else 29_500
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_NTASKS", "1")
    environ["LOCAL_RANK"] = "0" if one_each else str(local)
    environ["MASTER_ADDR"] = flags.master_addr or _first_host(environ)
    environ["MASTER_PORT"] = str(flags.master_port or environ.get("MASTER_PORT") or port)


def _first_host(environ: Mapping[str, str]) -> str:
    """The name or address of the job's first host."""
    command = ["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def processes_that_fit(argv: list[str], visible: int) -> int:
    """Every visible GPU; one for the demo, whose batches are few."""
    return 1 if parse_known(_Start, argv).demo else visible


if __name__ == "__main__":
    sys.exit(start())
