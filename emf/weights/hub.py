"""Folders from the Hugging Face Hub and onto it, by its own client."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from emf.files import why

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""OWNER/NAME, or OWNER/NAME@REVISION: a branch, a tag or a commit."""
NETWORK = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of the files of a network of transformers', with its tokenizer. In a pattern, as the Hub's client reads it,
a star stands for a slash too, so `model*` begins at the repository's root."""
AUTOENCODER = ("vae/*.json", "vae/*.safetensors", "config.json", "diffusion_pytorch_model*.safetensors*")
"""Of load_dcae's: a diffusers folder, or the autoencoder's own."""
ENCODER = ("text_encoder/*.safetensors", "language_model/*.safetensors", "connector*", *NETWORK)
"""Of a pretrained text encoder: its own folder, a diffusers folder, or one from emf convert or emf export."""
START = ("transformer*.safetensors", *ENCODER)
"""Of a folder from emf convert or emf export, to start from."""
PUBLISHED = ("transformer/*.safetensors", "diffusion_pytorch_model*.safetensors", "checkpoints/*.pth", *NETWORK)
"""Of published weights, for emf convert."""
SETTINGS = ("*config.json", "model_index.json", "transformer/time_embed_dual*")
"""Of any of these, what says its sizes."""


def named(where: Path | str, needs: Sequence[str], who: str, *, kind: str = "model") -> Path:
    """The folder of this spelling where there is one. Else, where it is spelled OWNER/NAME or OWNER/NAME@REVISION, the
    folder in the cache of the Hub's client that holds that repository's files of these patterns, fetched where the
    cache lacks them. Any other spelling is given back as it is, for its reader to say what is wrong with it.

    who: who asks, which stands before what is wrong. kind: `model` or `dataset`. Raises ValueError, saying what to
    download where, where the Hub does not give it.
    """
    found = NAME.fullmatch(str(where))
    if Path(where).exists() or found is None:
        return Path(where)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import filter_repo_objects

    name, revision = found.groups()
    try:
        fetched = Path(
            snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=list(needs), library_name="emf")
        )
    except HFValidationError:
        return Path(where)
    except Exception as error:  # the client's errors are of several libraries
        words = ["hf download", name, *["--repo-type dataset"] * (kind == "dataset")]
        words += [f"--revision {revision}"] * bool(revision)
        words += [*(f"--include '{pattern}'" for pattern in needs), f"--local-dir {name.partition('/')[2]}"]
        raise ValueError(
            f"{who}: no folder {where}, and the Hub does not give it ({_reason(error)}); where there is a network do "
            f"`{' '.join(words)}`, and name that folder"
        ) from None
    files = (str(f.relative_to(fetched)) for f in fetched.rglob("*") if f.is_file())
    if not any(filter_repo_objects(files, allow_patterns=list(needs))):
        raise ValueError(
            f"{who}: {where} on the Hub holds none of {', '.join(needs)}; is it another kind of repository?"
        )
    return fetched


def hub_name(folder: Path | str) -> str | None:
    """OWNER/NAME@COMMIT of a snapshot in the cache of the Hub's client, or of a folder in one; None of any other."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)", Path(folder).as_posix())
    return f"{found[1]}/{found[2]}@{found[3]}" if found else None


def _reason(error: Exception) -> str:
    """Why the Hub did not give something, without the addresses and numbers of requests that its client tells of."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner must let you in: ask there, then `hf auth login`",
        errors.RepositoryNotFoundError: "it has no such repository, or not for you: `hf auth login`",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.LocalEntryNotFoundError: "it cannot be reached, and the cache lacks it",
    }
    return next((text for kind, text in reasons.items() if isinstance(error, kind)), why(error))


def check_name(name: str) -> None:
    """Raises ValueError where this is no name that a repository of the Hub can have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("its owner is missing")
    except HFValidationError as error:
        raise ValueError(
            f"push: --push {name}; expected OWNER/NAME of a repository on the Hub ({why(error)})"
        ) from None


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload a folder as the model repository `name`, which is made where it is missing: private, or public where that
    is asked for. Says what it uploads before it does. Returns the repository's address.

    It needs a token that may write there, which the Hub's client finds by itself (`hf auth login`, HF_TOKEN). Raises
    ValueError where the Hub refuses or cannot be reached, and where the repository is public and that was not asked
    for; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    check_name(name)
    api, files = HfApi(), sorted(p for p in folder.rglob("*") if p.is_file())
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise ValueError("it is there and public; say --public, or give another name")
        total = sum(file.stat().st_size for file in files) / 1e6
        print(f"{name}, {'public' if public else 'private'}: uploading {len(files)} files, {total:,.1f} MB")
        for file in files:
            print(f"  {file.relative_to(folder)} {file.stat().st_size:,} bytes")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of emf")
    except Exception as error:  # the client's errors are of several libraries
        again = f"{folder} is whole"
        if not isinstance(error, ValueError):  # what was refused here is not to be got round
            again += f"; `hf upload {name} {folder}{'' if public else ' --private'}` tries again"
        raise ValueError(f"push: {name} was not uploaded: {why(error)}. {again}") from None
    return str(url)
