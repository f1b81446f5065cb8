"""Reads JSONL and parquet files into raw rows, each with the place where a person finds it. Knows no column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (origin, row). Raises ValueError naming file, line and rule."""
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _read_jsonl(path)
    raise ValueError(f"data.path: {str(path)!r}; must end in .jsonl or .parquet")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    decoder = msgspec.json.Decoder()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            origin = f"{path}:{number}"
            try:
                row = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{origin}: {error}; every line must be one JSON object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{origin}: a {type(row).__name__}; every line must be one JSON object")
            yield origin, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"data.path: {str(path)!r}; parquet needs pyarrow: pip install 'flowrl[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"data.path: {str(path)!r}; not a readable parquet file: {error}") from error
