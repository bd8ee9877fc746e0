"""Weights on disk. They are read tensor by tensor, from safetensors (one file or shards) or from a .pth, and written
piece by piece, so that no more than the input file that is being read is ever in memory.

safetensors' own writer needs all tensors of a file at once. The format is simple (8 bytes of length, a JSON header, the
data), and is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from emf.errors import Torn
from emf.files import files_in, read_object
from emf.model.state import STEMS, check_weights, read_pickle, read_state, variant

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that safetensors knows, by the names that it gives them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**18  # elements cast and written at a time
PICKLES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class Weights:
    """The tensors of some files by name. One file is open at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.entries = files, dict[str, Entry]()
        self._file: Path | None = None
        self._tensor: Callable[[str], Tensor] = lambda key: torch.empty(0)
        for file in files:
            self.entries |= _entries(file)

    def read(self, key: str) -> Tensor:
        """A tensor as a view of its file, not to be written to. Raises ValueError where the file is broken."""
        file = self.entries[key].file
        if file != self._file:
            self._tensor = lambda key: torch.empty(0)  # the former file is unmapped before the next is mapped
            self._file, self._tensor = file, _reader(file)
        return self._tensor(key)

    @property
    def bytes(self) -> int:
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self.entries.values())


def find(path: Path) -> list[Path]:
    """The files of the weights in a folder: the shards that an index names, a single safetensors file, or else a single
    .pth. Of a file the file itself. Empty where a folder holds none. A variant is taken where it is all there is; see
    emf.model.state.variant.

    Raises ValueError where there are several to choose from, or a shard is missing.
    """
    if not path.exists():
        raise ValueError(f"weights: no file or folder {path}")
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in PICKLES:
            raise ValueError(f"weights: {path} is of no known kind; expected .safetensors or one of {PICKLES}")
        return [path]
    indices, single = files_in(path, "*.safetensors.index.json"), files_in(path, "*.safetensors")
    if not indices and (kind := variant(path)):
        indices = files_in(path, f"*.safetensors.index.{kind}.json")
        single = [
            path / f"{stem}.{kind}.safetensors" for stem in STEMS if (path / f"{stem}.{kind}.safetensors").is_file()
        ]
    if len(indices) == 1:
        return shards(indices[0])
    usual = [p for p in single if p.name in [f"{stem}.safetensors" for stem in STEMS]]
    if not (several := indices or single):
        several = files_in(path, *(f"*{kind}" for kind in PICKLES))
    found = usual if len(usual) == 1 and not indices else several
    if len(found) > 1:
        raise ValueError(f"weights: {path} holds {len(found)} sets of weights; name one file: {found[0].name}, ...")
    return found


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names, which lie beside it. Raises ValueError where it is none, or one of them
    is missing."""
    named = read_object(index, "weights", "an index of shards").get("weight_map")
    names = [*named.values()] if isinstance(named, dict) else []
    if not names or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError(f"weights: {index} is no index of shards: its weight_map names no files")
    found = [index.parent / name for name in sorted({*names})]
    if lost := [file.name for file in found if not file.is_file()]:
        raise ValueError(f"weights: {index} names {len(lost)} files that are not there; first {lost[0]}")
    return found


def _entries(file: Path) -> dict[str, Entry]:
    if file.suffix in PICKLES:
        return {k: Entry(tuple(v.shape), v.dtype, file) for k, v in _unpickle(file).items()}
    with _opened(file) as handle:
        entries = {}
        for key in handle.keys():  # noqa: SIM118 - it is no dict
            part = handle.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"weights: {key} in {file} is {part.get_dtype()}; expected one of {', '.join(DTYPES)}")
            entries[key] = Entry(tuple(part.get_shape()), DTYPES[part.get_dtype()], file)
        return entries


def _reader(file: Path) -> Callable[[str], Tensor]:
    return _unpickle(file).__getitem__ if file.suffix in PICKLES else _opened(file).get_tensor


def _opened(file: Path) -> Any:
    check_weights(file)
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise Torn(f"weights: {file} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise ValueError(f"weights: {file} cannot be read: {error.strerror or error}") from None


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The state dict in a .pth: all that it holds, or its entry state_dict. Raises ValueError where there is none."""
    tree = read_pickle(file)
    if isinstance(tree, dict) and "state_dict" in tree:
        if others := [name for name in tree if name != "state_dict" and str(name).startswith("state_dict")]:
            warnings.warn(f"weights: {file} holds state_dict and {others[0]}; state_dict is read", stacklevel=2)
        tree = tree["state_dict"]
    kinds = isinstance(tree, dict) and [(type(k), isinstance(v, Tensor) and v.dtype in NAMES) for k, v in tree.items()]
    if not kinds or set(kinds) != {(str, True)} or any(v.layout != torch.strided for v in tree.values()):
        raise ValueError(f"weights: {file} holds no state dict; expected real tensors by name")
    return dict(tree)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file's header says beside its tensors. Raises ValueError where the file is broken."""
    with _opened(file) as handle:
        return dict(handle.metadata() or {})


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file whole, in float32. Raises ValueError where it is missing or broken."""
    return {k: v.float() for k, v in read_state(path).items()}


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str, names: set[str] | None = None) -> None:
    """Copy a state dict into a network, in the network's dtypes; every name and shape must agree. Of the network's
    weights those on the meta device come into being by it, on the CPU.

    names: of the network's weights that the state must hold; None: all of them. source: where the state comes from, for
    the error. Raises ValueError that names the first weight that does not agree.
    """
    own = network.state_dict() if names is None else {k: p for k, p in network.named_parameters() if k in names}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}" if extra else f"shape of {shapes[0]}"
        raise ValueError(
            f"weights: {source} is of another model: {len(missing)} missing, {len(extra)} extra, "
            f"{len(shapes)} misshaped keys; {first}"
        )
    with torch.no_grad():
        for name, value in state.items():
            if own[name].is_meta:
                # a copy: what was read may be a view of a file that may go away
                made = torch.empty(value.shape, dtype=own[name].dtype).copy_(value)
                network.load_state_dict({name: made}, strict=False, assign=True)
            else:
                own[name].copy_(value)


@torch.no_grad()
def module_stamp(module: nn.Module) -> str:
    """A digest of a network's weights and buffers: of the name, the shape and some 256 numbers, in float32, from all
    over each. Another one means other weights; where they lie and what the folder is called plays no part."""
    digest = hashlib.sha256()
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        numbers = x.flatten()[:: max(1, x.numel() // 256)].float().cpu().numpy()
        digest.update(f"{name} {tuple(x.shape)} ".encode() + numbers.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Item:
    """A tensor to be written: what the header says of it, and how it is made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def items(state: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Item]:
    """What is to be written of tensors that are in memory."""
    return [Item(k, tuple(v.shape), dtype or v.dtype, lambda v=v: v) for k, v in state.items()]  # type: ignore[misc]


def write(
    folder: Path,
    stem: str,
    items: Iterable[Item],
    advance: Callable[[int], Any] = lambda n: None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """`stem`.safetensors in the folder, or numbered shards of at most shard_bytes (a larger tensor has its own) with
    Hugging Face's index, in the order of the items.

    advance: told of the bytes written. Raises ValueError where a tensor is not as announced or the disk is full.
    """
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(i.bytes for i in shards[-1]) + item.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(i.bytes for shard in shards for i in shard)},
            "weight_map": {i.key: name for shard, name in zip(shards, names, strict=True) for i in shard},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for shard, name in zip(shards, names, strict=True):
        write_file(folder / name, shard, advance)


def write_file(
    file: Path,
    items: Iterable[Item],
    advance: Callable[[int], Any] = lambda n: None,
    metadata: dict[str, str] | None = None,
) -> None:
    """One safetensors file. advance: told of the bytes written. Raises ValueError where a tensor is not as announced or
    the disk is full."""
    shard = sorted(items, key=lambda i: -i.dtype.itemsize)  # wide dtypes first keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for item in shard:
        start, end = end, end + item.bytes
        header[item.key] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open(file, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for item in shard:
                for data in _pieces(item):
                    advance(out.write(data))
                    del data  # with it goes the mapping of the file that the tensor lies in
    except OSError as error:
        raise ValueError(f"weights: {file} cannot be written: {error.strerror or error}") from None


def _pieces(item: Item) -> Iterator[memoryview]:
    """The bytes of a tensor, a piece at a time."""
    tensor = item.make()
    if tuple(tensor.shape) != item.shape:
        raise ValueError(f"weights: {item.key} is {tuple(tensor.shape)}; announced as {item.shape}")
    for piece in tensor.detach().flatten().split(PIECE):
        yield piece.to("cpu", item.dtype).contiguous().view(torch.uint8).numpy().data
