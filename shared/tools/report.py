"""Write report.html of a run, or compare several runs on one page.

    python shared/tools/report.py RUN_DIR [--out FILE]             RUN_DIR/report.html
    python shared/tools/report.py compare RUN RUN … [--out FILE]   compare.html

The page is one file: no script, nothing fetched; it can be mailed. A run writes its own when it
ends; this makes it anew, also of a run that still goes on or was killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs, report
from shared.errors import DONE, UserError

COMPARED = "compare.html"


def main(argv: list[str] | None = None) -> int:
    """Write the page and print its path; the exit code."""
    logs.open_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        print(_compare(words[1:]) if words[:1] == ["compare"] else _report(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return DONE


def _report(words: list[str]) -> Path:
    parser = _parser("report.py")
    parser.add_argument("run_dir", type=Path, help="where the run's status.json lies")
    parser.add_argument("--out", type=Path, help=f"the page (default: RUN_DIR/{report.NAME})")
    args = parser.parse_args(words)
    return report.write(args.run_dir, args.out)


def _compare(words: list[str]) -> Path:
    parser = _parser("report.py compare")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", type=Path, default=Path(COMPARED), help=f"the page (default: {COMPARED})"
    )
    args = parser.parse_args(words)
    if len(args.runs) < 2:
        raise UserError("compare needs two run directories or more")
    from shared.report_comparison import write_comparison

    return write_comparison(args.runs, args.out)


def _parser(program: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
