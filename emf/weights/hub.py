"""A folder onto the Hugging Face Hub, by its own client."""

from __future__ import annotations

from pathlib import Path

from emf.files import why


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
        again = f"{folder} is whole; `hf upload {name} {folder}` tries again"
        raise ValueError(f"push: {name} was not uploaded: {why(error)}. {again}") from None
    return str(url)
