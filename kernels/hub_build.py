"""The folder that Hugging Face's package of kernels loads: `python kernels/hub_build.py OUT` writes OUT/build/torch-cpu
and OUT/build/torch-cuda, with a metadata.json each, of build.toml and torch-ext/ beside this file.

It is what kernel-builder writes of a kernel that has nothing to compile, without Nix. Only the standard library is
used.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def build(out: Path) -> list[Path]:
    """The variants' folders in out/build. Raises ValueError where there is something in that place."""
    told = tomllib.loads((HERE / "build.toml").read_text())
    general, suffixes = told["general"], {f".{end}" for end in told["torch-noarch"]["pyext"]}
    name = general["name"].replace("-", "_")
    source = (HERE / "torch-ext" / name).resolve()
    files = sorted(p for p in source.rglob("*") if p.suffix in suffixes)
    made = []
    for backend in general["backends"]:
        folder = out / "build" / f"torch-{backend}"
        if folder.exists():
            raise ValueError(f"hub_build: {folder} exists; name another folder")
        for file in files:
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        (folder / "metadata.json").write_text(json.dumps(metadata(general, backend, folder), indent=2) + "\n")
        made.append(folder)
    return made


def metadata(general: dict[str, Any], backend: str, folder: Path) -> dict[str, Any]:
    """What metadata.json says of a variant: a name that no other build has, and a digest of every file."""
    content = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    digests = {name: hashlib.sha256(data).digest() for name, data in content.items()}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    return {
        "name": general["name"],
        "id": f"_{general['name'].replace('-', '_')}_{backend}_{whole}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {k: base64.b64encode(v).decode() for k, v in digests.items()}},
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kernels/hub_build.py OUT")
    try:
        print(*build(Path(sys.argv[1])), sep="\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
