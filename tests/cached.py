"""A cache's settings as `emf cache` writes them, for tests that read no sample of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def cache_settings(folder: Path, **changes: Any) -> Path:
    """A folder with a settings.json of two sources, and no shard."""
    told: dict[str, Any] = dict(version=1, encoder="AutoencoderDC", tokenizer="TA-Tok", dtype="float32", shard=8)
    told |= dict(size=512, token_size=384, keys="0", names=["a", "b"], counts=[3, 4], weights=[1.0, 1.0])
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(told | changes))
    return folder
