"""Small Parquet files of images and captions, as Hugging Face's `datasets` writes them, for the tests of the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"info": {"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}}}


def image_column(images: Sequence[bytes | None]) -> Any:
    return pa.array([None if x is None else {"bytes": x, "path": f"{i}.png"} for i, x in enumerate(images)], IMAGE)


def write_parquet(path: Path, columns: Mapping[str, Any], group: int = 3, **how: Any) -> Path:
    """A file with these columns, `group` rows a row group; images that are bytes become Hugging Face's struct."""
    made = {
        name: image_column(x) if isinstance(x, list) and any(isinstance(v, bytes) for v in x) else x
        for name, x in columns.items()
    }
    table = pa.table(made).replace_schema_metadata({"huggingface": json.dumps(FEATURES)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **how)
    return path
