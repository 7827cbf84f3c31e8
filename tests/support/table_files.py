"""Tables for the tests of readers: the same rows as JSONL, CSV and Parquet, and small images."""

import csv
import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

Values = dict[str, Any]


def png(shade: int = 0, size: tuple[int, int] = (56, 56)) -> bytes:
    """Return the bytes of a plain image."""
    buffer = BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, shade // 2)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Write ``a.png`` and so on, each of another shade."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(png(number * 10 % 256))


def write_table(path: Path, rows: list[Values]) -> Path:
    """Write rows in the format of the suffix; a CSV file holds lists as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            table.writeheader()
            for row in rows:
                table.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path
