"""Pictures that are named by an address, or that stand in the row itself as base64."""

from __future__ import annotations

import base64
import binascii
import io
from concurrent.futures import ThreadPoolExecutor

from shared.errors import one_line, shortened
from vasevqa.model.rows import is_file
from vasevqa.model.training_files import TrainingFile

_SECONDS, _AT_ONCE = 10.0, 8


def mark_dead(file: TrainingFile) -> None:
    """Mark the rows of which a picture is not to be had: an address is asked, base64 is read."""
    named = {image for row in file.rows for image in row.images if not is_file(image)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reasons = dict(zip(named, pool.map(_why_not, named), strict=True))
    for row in file.rows:
        for image in row.images:
            if reason := reasons.get(image):
                file.bad.setdefault(row.number, f"{shortened(image)} {reason}")


def _why_not(image: str) -> str | None:
    return _asked(image) if image.startswith("http") else _in_the_row(image)


def _in_the_row(image: str) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        content = base64.b64decode(image.rpartition(",")[2], validate=True)
        Image.open(io.BytesIO(content)).verify()
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return "is no picture in base64"
    return None


def _asked(address: str) -> str | None:
    import httpx

    try:
        with httpx.stream("GET", address, timeout=_SECONDS, follow_redirects=True) as answer:
            return f"answers {answer.status_code}" if answer.is_error else None
    except httpx.HTTPError as error:
        return f"cannot be fetched ({one_line(error) or type(error).__name__})"
