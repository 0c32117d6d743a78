"""Supervised fine-tuning and GRPO with ms-swift: what ./sft.sh and ./grpo.sh start.

    ./sft.sh [--flag value …]      LoRA on a vision-language model; ./grpo.sh the reinforcement
    ./sft.sh --demo                the built-in demo, in vasevqa/demo
    ./sft.sh --dry-run             check everything, print the swift command, stop
    ./sft.sh --estimate            memory of the run, and stop
    ./sft.sh --resume never        start anew; default: continue an interrupted run
    ./sft.sh --nproc 4             processes on this host (also: NPROC_PER_NODE)

Every other flag is ms-swift's (`swift sft --help`, `swift rlhf --help`) and wins over the one in
the script; those of older releases, as --train_type, keep working. A row that swift would not train
on ends the run before it begins: --skip-bad-rows leaves it out, and counts it; --no-image-check
decodes 64 pictures and not all of them.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared import logs
from shared.errors import DONE, USER_ERROR
from shared.launch import launch_alone

if TYPE_CHECKING:
    from vasevqa.model.plan import Plan
    from vasevqa.model.preflight import Findings

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Check, then become the supervised swift run; the exit code when something keeps it from it.

    argv: sft or grpo, the script's own flags, `---`, what the user typed.
    """
    from vasevqa.model import plan as planning

    script, *words = argv
    end = words.index("---")
    documented, typed = words[:end], words[end + 1 :]
    if {"-h", "--help"} & set(typed):
        sys.stdout.write(__doc__ or "")
        return DONE
    plan = _plan(script, documented, typed)
    planning.max_pixels(os.environ)
    if "estimate" in plan.own:
        from vasevqa.model import memory

        sys.stdout.write(memory.text(plan, planning.max_pixels(os.environ)) + "\n")
        return DONE
    if "print_config" in plan.own:
        sys.stdout.write(json.dumps(plan.flags, indent=2, ensure_ascii=False) + "\n")
        return DONE
    return _check_and_run(plan)


def _plan(script: str, documented: list[str], typed: list[str]) -> "Plan":
    from shared.device import check_mask, present_gpus, visible_gpus
    from vasevqa.model import plan as planning

    present = present_gpus()
    check_mask(os.environ, present)
    here = Path.cwd()
    plan = planning.make(script, documented, typed, here, HERE)
    if "demo" in plan.own:
        from vasevqa.demo_data import demo

        typed = [*demo.flags(script, demo.build(HERE.parent / "demo")), *typed]
        plan = planning.make(script, documented, typed, here, HERE)
    for name in ("nproc", "nproc_per_node"):
        if plan.own.get(name):
            os.environ["NPROC_PER_NODE"] = plan.own[name][0]
    return planning.for_this_machine(plan, visible_gpus(os.environ, present), os.environ)


def _check_and_run(plan: "Plan") -> int:
    from vasevqa.model import plan as planning
    from vasevqa.model import preflight

    for note in plan.notes:
        preflight.log.info(note)
    found = preflight.check(plan, _roots())
    skips = "skip_bad_rows" in plan.own
    if not found.others and (skips or not found.problems):
        preflight.check_rows(plan, found.files)
    if skips:
        found.leave_out_bad_rows()
    for problem in found.problems:
        logs.say(f"error: {problem}")
    if found.problems:
        return USER_ERROR
    steps = planning.num_steps(plan, found.num_rows)
    preflight.log.info(
        "%d rows; %s optimizer steps; %d process(es); checkpoints in %s",
        found.num_rows, steps, plan.world_size, plan.output_dir,
    )  # fmt: skip
    return _run(plan, found, steps)


def _run(plan: "Plan", found: "Findings", steps: int) -> int:
    from shared import lock
    from vasevqa.model import receipt, runs, training_files

    runs.typed_checkpoint(plan)
    if "dry_run" in plan.own:
        sys.stdout.write(f"swift {shlex.join(plan.command)}\n")
        return DONE
    os.close(lock.take(plan.output_dir, "--output_dir"))  # before anything there is changed
    continued = runs.begin(plan)
    runs.describe(plan)
    ready, root = training_files.given_to_swift(continued, found.files)
    bar = {} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "30"}  # a log is read line by line
    variables = {"TOKENIZERS_PARALLELISM": "false", **bar, **os.environ}
    if "demo" in plan.own:  # all that a demo makes is in its folder
        variables.setdefault("MODELSCOPE_CACHE", str(HERE.parent / "demo" / "cache"))
    if root:
        variables["ROOT_IMAGE_DIR"] = str(root)
    if "resume_from_checkpoint" not in continued.flags:
        (plan.output_dir / receipt.SEEN).unlink(missing_ok=True)
    code = _supervise(ready, steps, variables, found.counts)
    receipt.close(
        plan.output_dir,
        dict(zip(map(str, ready.train_files), found.files, strict=False)),
        is_done=code == DONE,
        is_whole=plan.wants_every_row,
    )
    return code


def _supervise(plan: "Plan", steps: int, variables: dict[str, str], data: dict[str, int]) -> int:
    """Run swift with the care our own runs get: lock, status, signals, exit code."""
    from shared import program

    sys.stdout.write(f"swift {shlex.join(plan.command)}\n")
    command = [sys.executable, str(HERE / "swift_command.py"), *plan.command]
    options = program.ProgramOptions(recipe="vasevqa", total_steps=steps)
    return program.run(command, plan.output_dir, options, env=variables, data=data)


def _roots() -> list[Path]:
    given = os.environ.get("ROOT_IMAGE_DIR")
    return [*([Path(given).absolute()] if given else []), Path.cwd(), HERE]


if __name__ == "__main__":
    sys.exit(launch_alone(main))
