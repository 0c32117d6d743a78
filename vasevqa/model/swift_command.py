"""Run a swift command in this process, or as torchrun's processes: `python swift_command.py sft …`.

The same as `swift sft …`, and a signal reaches it: swift's own command waits for another process,
which hears nothing of SIGTERM. Loader workers get process groups of their own, for torchrun signals
whole groups, and a run whose workers are gone cannot save.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.device import keep_freed_memory, present_gpus
from shared.errors import FAILED, MissingToolError, is_out_of_memory
from shared.processes import die_with_parent

SEVERAL = ("sft", "rlhf")  # commands that torchrun may run
_VARIABLES = ("NPROC_PER_NODE", "MASTER_PORT", "NNODES", "NODE_RANK", "MASTER_ADDR")


def main(argv: list[str]) -> None:
    """Run the command `argv[0]` with the flags after it, as swift's own command would."""
    command, *flags = argv
    asked = any(os.environ.get(name) for name in ("NPROC_PER_NODE", "NNODES"))
    if command in SEVERAL and asked and "RANK" not in os.environ:
        _become_torchrun(argv)
    if "RANK" in os.environ:
        die_with_parent()
    if present_gpus() == 0:
        keep_freed_memory()
    os.register_at_fork(after_in_child=_leave_the_group)
    script = _script(command)
    sys.argv = [str(script), *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        if command not in SEVERAL or not is_out_of_memory(error):
            raise
        from vasevqa.model import out_of_memory

        sys.excepthook(type(error), error, error.__traceback__)  # as it would end without us
        out_of_memory.explain(argv, os.environ)
        sys.exit(FAILED)


def _become_torchrun(argv: list[str]) -> NoReturn:
    options = [
        word
        for name in _VARIABLES
        if (value := os.environ.get(name))
        for word in (f"--{name.lower()}", value)
    ]
    # SIGHUP is left to nohup; gloo restarts meet only without the shared store
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words = [*("-m", "torch.distributed.run", "--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT")]
    os.execv(sys.executable, [sys.executable, *words, *options, __file__, *argv])


def _script(command: str) -> Path:
    """Swift's own file for a command."""
    spec = find_spec("swift")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root, "cli", f"{command.replace('-', '_')}.py")
        if path.is_file():
            return path
    raise MissingToolError(f"ms-swift has no command {command}: pip install 'ms-swift>=4.6,<5'")


def _leave_the_group() -> None:
    os.setpgid(0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
