"""AudioCaps' sounds out of parquet files, as the Hub's data sets keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multimodal import clip_ledger
from shared.errors import MissingToolError, UserError, one_line
from shared.files import write_atomic

_ROWS = 64  # read at once
_SUFFIXES = {b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg", b"ID3\x03": ".mp3"}


def unpack(root: Path, tables: Sequence[Path], directory: Path) -> None:
    """Write the sounds of the missing clips as <youtube id>_<start>.<kind> into `directory`.

    A row is known by its columns youtube_id and start_time; its sound is in a column `audio` of
    bytes, or of {bytes, path}. Raises UserError for other tables, MissingToolError without pyarrow.
    """
    wanted = {item.clip.key for item in clip_ledger.missing(root)}
    directory.mkdir(parents=True, exist_ok=True)
    for path in tables:
        for row in _rows(path):
            key = f"{row['youtube_id']}_{int(float(row['start_time']))}"
            sound = row["audio"]
            content = sound.get("bytes") if isinstance(sound, Mapping) else sound
            if key in wanted and isinstance(content, bytes) and content:
                target = directory / f"{key}{_SUFFIXES.get(content[:4], '.mp3')}"
                write_atomic(target, lambda s, c=content: (s.write(c), None)[1], durable=False)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingToolError(
            f"{path.name} is a parquet file: pip install pyarrow, then type the same command"
        ) from None
    columns = ["youtube_id", "start_time", "audio"]
    try:
        table = pyarrow.parquet.ParquetFile(path)
        lacking = [name for name in columns if name not in table.schema_arrow.names]
        if lacking:
            raise UserError(
                f"{path} has no column {', '.join(lacking)}, only "
                f"{', '.join(table.schema_arrow.names)}: unpack it yourself and give "
                "--audiocaps-source local:DIRECTORY"
            )
        for batch in table.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({one_line(error)})") from None
