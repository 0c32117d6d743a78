"""Convert a Hugging Face model to Megatron-Core's format: what ./hf2megatron.sh starts.

What the conversion needs is looked for first, within a second; without it the exit code is 3.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.errors import DONE, USER_ERROR, MissingToolError, UserError, one_line
from shared.launch import launch_alone

HERE = Path(__file__).resolve().parent
# module → what pip calls it
NEEDED = {
    "megatron.core": "megatron-core>=0.16",
    "mcore_bridge": "mcore-bridge>=1.6.3",
    "transformer_engine": "transformer-engine[pytorch]",
}
_INSTALL = f"pip install -r {HERE.parent / 'requirements-megatron.txt'}"


def main(argv: list[str]) -> int:
    """Check, then run `swift export --to_mcore true`; the exit code. argv as in train.py."""
    from vasevqa.model import needs, paths, swift_flags

    end = argv.index("---")
    typed = argv[end + 1 :]
    if {"-h", "--help"} & set(typed):
        sys.stdout.write(__doc__ or "")
        return DONE
    base, _ = swift_flags.translate(swift_flags.read(argv[:end]))
    words, _ = swift_flags.translate(swift_flags.read(typed))
    flags = paths.absolute(base, HERE) | paths.absolute(words, Path.cwd())
    dry = flags.pop("dry_run", None) is not None
    swift_flags.refuse_unknown(flags)
    refuse_missing_tools()
    problems = list(needs.model(flags, is_grpo=False))
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if problems:
        return USER_ERROR
    return _convert(flags, dry=dry)


def refuse_missing_tools() -> None:
    """Raise MissingToolError naming what the conversion needs and this machine lacks."""
    from shared.device import present_gpus, visible_gpus

    missing = [name for module, name in NEEDED.items() if not _is_there(module)]
    if missing:
        raise MissingToolError(f"the conversion needs {', '.join(missing)}: {_INSTALL}")
    if visible_gpus(os.environ, present_gpus()) == 0:
        raise MissingToolError(
            "the conversion needs an NVIDIA GPU (Transformer Engine, and the comparison of both "
            "models' outputs): run it on a machine with one"
        )
    try:  # the package of this name on the index is empty until its CUDA part is built
        importlib.import_module("transformer_engine")
    except (ImportError, RuntimeError, OSError) as error:
        reason = one_line(error)
        raise MissingToolError(
            f"transformer_engine does not import ({reason}): {_INSTALL}"
        ) from None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _convert(flags: dict[str, list[str]], *, dry: bool) -> int:
    from shared import program
    from vasevqa.model import plan, swift_flags

    output = Path(swift_flags.text(flags, "output_dir"))
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is there already: type another --output_dir, or move it away")
    model = swift_flags.text(flags, "model")
    if plan.architecture(model) == plan.ARCHITECTURE:
        flags = {"model_type": [plan.ARCHITECTURE], "template": [plan.ARCHITECTURE]} | flags
    words = ["export", *swift_flags.write(flags)]
    sys.stdout.write(f"swift {shlex.join(words)}\n")
    if dry:
        return DONE
    command = [sys.executable, str(HERE / "swift_command.py"), *words]
    status = output.with_name(f"{output.name}.status")  # swift wants to make its own directory
    return program.run(command, status, program.ProgramOptions(recipe="vasevqa"))


if __name__ == "__main__":
    sys.exit(launch_alone(main))
