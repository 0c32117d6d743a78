"""Given, left out and trained on: what became of each row, from what swift's collator saw.

Standard library only.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from shared import outcome
from shared.files import read_json_lines, read_object, write_json, write_text
from vasevqa.model.training_files import TrainingFile

log = logging.getLogger(__name__)

NAME = "receipt.jsonl"
SEEN = ".receipt"  # what plugin/receipt.py writes, until the run is done
_PLACE = "receipt_place"
_NAMED = 5  # rows that the warning names


def close(
    run_dir: Path, files: Mapping[str, TrainingFile], *, is_done: bool, is_whole: bool
) -> None:
    """Write receipt.jsonl, and the counts into the run's status; a row that is missing is named.

    files: each training file by the path that swift read. is_done: whether the run ended well; of
    another the reason stays the last line. is_whole: whether it was to see all rows.
    """
    if not (run_dir / SEEN).is_file():
        return
    seen = Counter(place for batch in read_json_lines(run_dir / SEEN) for place in batch["places"])
    held = {row.get(_PLACE) for row in read_json_lines(run_dir / "val_dataset.jsonl")}
    lines, missing, trained, validated = [], [], 0, 0
    for path, file in files.items():
        for at, row in enumerate(file.rows):
            place = f"{at} {path}"
            lines.append({"file": str(file.path), "row": row.number, "seen": seen[place]})
            trained += seen[place] > 0
            validated += place in held
            if not seen[place] and place not in held:
                missing.append(f"{file.path}, row {row.number}")
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_text(run_dir / NAME, text)
    left_out = sum(file.left_out for file in files.values())
    counts = {"rows": len(lines) + left_out, "rows left out": left_out}
    counts |= {"rows for validation": validated, "rows trained on": trained}
    counts = {name: n for name, n in counts.items() if n or name == "rows trained on"}
    fields = read_object(run_dir / "status.json")
    write_json(run_dir / "status.json", fields | {"data": counts})
    outcome.leave_page(run_dir)
    if not is_done:
        return
    log.info("%s (%s)", "; ".join(f"{name}: {n}" for name, n in counts.items()), run_dir / NAME)
    if missing and is_whole:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        log.warning("swift did not train on %s%s", "; ".join(missing[:_NAMED]), more)
