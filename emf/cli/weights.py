"""`emf convert`, `emf export` and `emf release`: what the commands do, one function each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from emf.limits import Within
from emf.model.sizes import Scale

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Path,
    config: Path | None = None,
    *,
    embedder_init: Literal["duplicate", "preserve"] = "duplicate",
    time_scale: Scale = 1.0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    allow_missing: tuple[str, ...] = (),
    allow_extra: tuple[str, ...] = (),
    allow_misshaped: tuple[str, ...] = (),
    shard_gb: Annotated[float, Within(above=0, most=1e6)] = 5.0,
) -> None:
    """Published weights into a folder to start from (--init): SANA, BLIP3o-NEXT, or EMF's own.

    Args:
        source: a diffusers SANA folder, an original .pth, a BLIP3o-NEXT folder or a released EMF checkpoint; or the
            OWNER/NAME of one on the Hugging Face Hub
        out: the folder; must not exist
        config: diffusers' config.json of the transformer, where the source has none
        embedder_init: how EMF's two time embedders begin where the source has none: as copies, or so that the function
            is kept
        time_scale: what EMF's two time embedders multiply t and t - r with
        dtype: number format of the written tensors; default: that of each in the source
        allow_missing: patterns of names of tensors that the source may lack
        allow_extra: patterns of names of tensors that the source may have without a use for them
        allow_misshaped: patterns of names of tensors that may have another shape, and then count as missing
        shard_gb: size of the largest file that is written, in 1e9 bytes
    """
    from emf.weights.convert import convert as run
    from emf.weights.hub import PUBLISHED, named

    source = named(source, PUBLISHED, "convert")
    how: dict[str, Any] = dict(config=config, embedder_init=embedder_init, time_scale=time_scale, dtype=dtype)
    how |= dict(allow_missing=allow_missing, allow_extra=allow_extra, allow_misshaped=allow_misshaped)
    print(run(source, out, **how, shard_gb=shard_gb))
    print(f"{out}: whole; train with --init {out}")


def export(
    run: RunFolder,
    out: Path,
    base: Path | None = None,
    text: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    adapters: bool = False,
    *,
    push: str | None = None,
    public: bool = False,
) -> None:
    """A run as a folder in diffusers' layout, for EMFPipeline.from_pretrained, `emf generate`, and diffusers alone.

    Args:
        run: a run's folder, one of its checkpoints, or a folder from emf convert; low-rank adapters are merged, but
            with adapters
        out: the folder; must not exist
        base: a diffusers folder whose vae, text encoder and tokenizer go with it; default: that of the run's data
        text: a folder from emf convert whose language model goes with it; default: the run's condition
        dtype: number format that the transformer is written in
        adapters: write low-rank adapters alone, as peft and diffusers read them, and what was trained in full beside
        push: upload the folder to the Hugging Face Hub as this repository, OWNER/NAME, which is private
        public: with push: make the repository public
    """
    from emf.weights.hub import check_name
    from emf.weights.hub import push as upload

    if public and push is None:
        raise ValueError("export: --public is of a repository on the Hub; name it with --push OWNER/NAME")
    if push is not None:
        check_name(push)  # what cannot be is said before anything is written
    if adapters:
        from emf.weights.lora import export_adapters

        if base:
            raise ValueError("export: adapters go on a base that stays where it is; leave out --base")
        export_adapters(run, out, dtype, text)
        print(f"{out}: adapters; EMFPipeline.from_pretrained(base, adapters={str(out)!r})")
    else:
        from emf.weights.export import export as run_export

        run_export(run, out, base=base, text=text, dtype=dtype, name=push)
        print(f"{out}: whole; its README.md says how to draw from it")
    if push is not None:
        print(f"{push}: {upload(out, push, public=public)}")


def release(run: RunFolder, out: Path) -> None:
    """A run's averaged weights in half precision as one safetensors file, to start other runs from (--init).

    Args:
        run: a run's folder, or one of its checkpoints
        out: the file; must not exist
    """
    from emf.weights.export import release as run_release

    print(f"{out}: {run_release(run, out) / 1e6:.2f} MB")
