"""Output folders: who a folder belongs to is told by a file of settings in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emf.files.reading import read_json
from emf.files.writing import finite, make_folder, write_json

SETTINGS = "settings.json"


def check_folder(
    out: Path, own: Sequence[str] | None, *, name: str = SETTINGS, who: str = "", advice: str = "give another folder"
) -> None:
    """Raises ValueError where `out` is a file, or holds what is not ours. It is ours where the file `name` is in it.

    own: files that only we write there, and so are somebody else's without `name`; other files do not matter. None:
    every file matters (what a kill left of a file, *.part, does not). who: how the error's text begins.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{who}{out} is no folder; {advice}")
    if (out / name).exists() or not out.is_dir():
        return
    if own is not None:
        strange = next((out / n for n in own if (out / n).exists()), None)
    else:
        strange = next((file for file in sorted(out.iterdir()) if file.suffix != ".part"), None)
    if strange:
        raise ValueError(f"{who}{strange} exists without {name}, so it was made by something else; {advice}")


def check_claim(
    out: Path,
    settings: Mapping[str, Any],
    own: Sequence[str] | None,
    *,
    name: str = SETTINGS,
    growing: str | None = None,
    who: str = "",
    advice: str = "give another folder",
) -> bool:
    """What `claim` would do, without doing it: whether the folder `out` is ours already. Raises ValueError."""
    check_folder(out, own, name=name, who=who, advice=advice)
    path = out / name
    now = finite(dict(settings))
    if not path.exists():
        return False
    try:
        old = read_json(path)
    except ValueError as error:
        raise ValueError(f"{who}{error}; {advice}") from None
    if not isinstance(old, dict) or (growing and not isinstance(old.get(growing), dict)):
        raise ValueError(f"{who}{path} holds no settings of ours; {advice}")
    if growing and (lost := [n for n in old[growing] if now[growing].get(n) != old[growing][n]]):
        raise ValueError(f"{who}{out} holds results of {lost[0]} ({old[growing][lost[0]]}); name it too, or {advice}")
    changed = [k for k in sorted(old.keys() | now.keys()) if k != growing and old.get(k) != now.get(k)]
    if changed:
        told = ", ".join(f"{k} was {str(old.get(k))[:40]}, is {str(now.get(k))[:40]}" for k in changed)
        raise ValueError(f"{who}{out} holds what was made by other settings ({', '.join(changed)}); {advice} ({told})")
    return True


def claim(
    out: Path,
    settings: Mapping[str, Any],
    own: Sequence[str] | None,
    *,
    name: str = SETTINGS,
    growing: str | None = None,
    who: str = "",
    advice: str = "give another folder",
    writer: int | None = None,
) -> bool:
    """Make the folder `out` ours, or go on in it: nothing is overwritten, and what was made by other settings is not
    mixed with it. Writes out/`name` where there is none. Returns whether it was ours before.

    own: see check_folder. growing: a key of settings, whose value is a dict by name that may get more names and lose
    none; new ones are left out of the file until `write_settings`, when there is something of theirs. writer: see
    emf.files.whole_file. Raises ValueError, its text beginning with `who`.
    """
    ours = check_claim(out, settings, own, name=name, growing=growing, who=who, advice=advice)
    if not ours:
        make_folder(out)
        kept = {**settings, growing: {}} if growing else settings
        write_settings(out, kept, name=name, writer=writer)
    return ours


def write_settings(out: Path, settings: Mapping[str, Any], *, name: str = SETTINGS, writer: int | None = None) -> None:
    """Write down the settings that `out` holds results of. Raises ValueError where that cannot be."""
    write_json(out / name, dict(settings), sort_keys=True, writer=writer)
