"""Write report.html of a run.

    python shared/tools/report.py RUN_DIR [--out FILE]             RUN_DIR/report.html

The page is one file: no script, nothing fetched; it can be mailed. A run writes its own when it
ends; this makes it anew, also of one that is still running or was killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import gone, logs, report
from shared.errors import DONE, UserError


def main(argv: list[str] | None = None) -> int:
    """Write the page and print its path; the exit code."""
    logs.open_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        gone.refuse(["report.py", *words])
        args = _parser().parse_args(words)
        print(report.write(args.run_dir, args.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="where the run's status.json lies")
    parser.add_argument("--out", type=Path, help=f"the page (default: RUN_DIR/{report.NAME})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
