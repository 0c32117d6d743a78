"""Merge a LoRA adapter into its base, as a model of its own: what ./merge.sh starts.

    ./merge.sh                                     the newest adapter below output
    ./merge.sh --adapters ./output/7B/checkpoint-600 [--output_dir DIR]
    ./merge.sh --demo                              the built-in demo
    ./merge.sh --dry-run                           say what would be merged, stop

The result is made beside its place, compared with base and adapter, and then put there; what was
there before is kept as checkpoint-merged.1, .2, … After a run that trained the whole model (GRPO
with --tuner_type full) there is nothing to merge, and the model is put there as it is.
"""

import contextlib
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.errors import DONE, UserError
from shared.files import read_object, write_json
from shared.launch import launch_alone

if TYPE_CHECKING:
    from vasevqa.model.merging import Merge
    from vasevqa.model.runs import Checkpoint
    from vasevqa.model.swift_flags import Flags

log = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
OWN = ("demo", "dry_run", "exist_ok")  # exist_ok would keep old weights, silently


def main(argv: list[str]) -> int:
    """Choose, merge, compare, put in place; the exit code. argv as in train.py."""
    from vasevqa.model import merging, needs, swift_flags

    end = argv.index("---")
    if {"-h", "--help"} & set(argv[end + 1 :]):
        sys.stdout.write(__doc__ or "")
        return DONE
    flags, own = _flags(argv[:end], argv[end + 1 :])
    target = Path(swift_flags.text(flags, "output_dir"))
    chosen = merging.choose(flags.get("adapters", [None])[0], target.parent)
    if not chosen.is_adapter:
        return _publish(chosen, target, dry="dry_run" in own)
    merge = merging.plan(chosen, target)
    if "model" in flags:
        for problem in needs.model(flags, is_grpo=False):
            raise UserError(problem)
        merge = merging.Merge(merge.adapter, swift_flags.text(flags, "model"), target)
    log.info("adapter %s, base %s", merge.adapter, merge.base)
    if merge.is_done:
        log.info("done before: %s was made of this adapter", target)
        return DONE
    return _merge(merge, flags, dry="dry_run" in own)


def _flags(documented: list[str], typed: list[str]) -> "tuple[Flags, Flags]":
    """Swift's flags, and ours."""
    from vasevqa.model import paths, swift_flags

    base, _ = swift_flags.translate(swift_flags.read(documented))
    words, notes = swift_flags.translate(swift_flags.read(typed))
    if "demo" in words:
        base["output_dir"] = [str(HERE.parent / "demo" / "runs" / "checkpoint-merged")]
    for note in notes:
        log.info(note)
    flags = paths.absolute(base, HERE) | paths.absolute(words, Path.cwd())
    own = {name: flags.pop(name) for name in OWN if name in flags}
    swift_flags.refuse_unknown(flags)
    swift_flags.check_numbers(flags)
    return flags, own


def _merge(merge: "Merge", flags: "Flags", *, dry: bool) -> int:
    from shared import lock, program
    from vasevqa.model import merging, runs, swift_flags

    fresh = merge.target.with_name(f".{merge.target.name}.{os.getpid()}")
    named = {"adapters": [str(merge.adapter)], "model": [merge.base], "output_dir": [str(fresh)]}
    words = ["export", *swift_flags.write(flags | named)]
    sys.stdout.write(f"swift {shlex.join(words)}\n")
    if dry:
        return DONE
    _check_room(merge)
    command = [sys.executable, str(HERE / "swift_command.py"), *words]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    options, run_dir = program.ProgramOptions(recipe="vasevqa"), merge.target.parent / "merge"
    os.close(lock.take(run_dir, "--output_dir"))  # refused before anything there is changed
    runs.describe_merge(run_dir, flags | named, shlex.join(["swift", *words]))
    try:
        code = program.run(command, run_dir, options, env=env)
        if code != DONE:
            return code
        merging.verify(merge, fresh)
        _forget_plugins(fresh)
        note = merge.note
        if Path(merge.base) == merge.target:  # which is kept under another name in a moment
            note["base"] = str(_free_name(merge.target))
        write_json(fresh / merging.NOTE, note)
        _put_in_place(fresh, merge.target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return DONE


def _forget_plugins(merged: Path) -> None:
    """Take the plugins of the training out of the model's args.json: swift would look for them."""
    args = read_object(merged / "args.json")
    if args.get("external_plugins"):
        write_json(merged / "args.json", args | {"external_plugins": []})


def _check_room(merge: "Merge") -> None:
    """Raise UserError when the disk has no room for another model."""
    merge.target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in Path(merge.base).glob("*.safetensors"))
    free = shutil.disk_usage(merge.target.parent).free
    if free < size:
        raise UserError(
            f"{merge.target.parent} has {free / 1e9:.1f} GB free and the merged model needs "
            f"{size / 1e9:.1f} GB: free some, or type another --output_dir"
        )


def _publish(chosen: "Checkpoint", target: Path, *, dry: bool) -> int:
    """Put a checkpoint that holds a whole model where the merged one is looked for."""
    from vasevqa.model import merging

    log.info("nothing to merge: %s is a whole model", chosen.path)
    merge = merging.Merge(chosen.path, str(chosen.path), target)
    if dry or merge.is_done:
        return DONE
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.mkdir(parents=True)
    try:
        for path in merging.model_files(chosen.path):
            _link(path, fresh / path.name)
        for problem in merging.weights(fresh):
            raise UserError(problem)
        write_json(fresh / merging.NOTE, merge.note)
        _put_in_place(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return DONE


def _link(source: Path, target: Path) -> None:
    """A second name for the file where the disk allows it, else a copy: models are large."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def _free_name(target: Path) -> Path:
    """What `target` is called when another one takes its place."""
    number = 1
    while (kept := target.with_name(f"{target.name}.{number}")).exists():
        number += 1
    return kept


def _put_in_place(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; what is there is kept under the first free number."""
    if target.exists():
        kept = _free_name(target)
        target.rename(kept)
        log.info("what was in %s is now in %s; remove it when you no longer need it", target, kept)
    fresh.rename(target)
    log.info("%s is the merged model", target)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
