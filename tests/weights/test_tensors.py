"""Files of weights: what is written here is what safetensors and transformers read, and the other way round."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from emf.weights import tensors as weights
from emf.weights.tensors import DTYPES, Item, Weights, find, items, read_metadata, write, write_file


def state() -> dict[str, Tensor]:
    """Every dtype, odd sizes, a number, nothing, a view with strides."""
    g = torch.Generator().manual_seed(0)
    out = {f"{name}.x": (torch.randn(3, 5, generator=g) * 3).to(dtype) for name, dtype in DTYPES.items()}
    out |= {f"{name}.one": torch.ones(1).to(dtype) for name, dtype in DTYPES.items()}
    out = {"odd": torch.ones(3, dtype=torch.uint8)} | out
    return out | {"number": torch.tensor(2.5), "none": torch.zeros(0, 4), "view": torch.randn(6, 4, generator=g).T[::2]}


def same(a: Tensor, b: Tensor) -> bool:
    as_bytes = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_safetensors_reads_what_is_written(tmp_path: Path, shard_bytes: int) -> None:
    told: list[int] = []
    write(tmp_path, "x", items(state()), told.append, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {k: v for file in files for k, v in load_file(file).items()}
    assert found.keys() == state().keys() and all(same(found[k], v) for k, v in state().items())
    assert sum(told) == sum(v.nbytes for v in state().values())
    with safe_open(files[0], "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    if shard_bytes > 10**6:
        assert [f.name for f in files] == ["x.safetensors"]
    else:
        index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
        assert index["weight_map"] == {k: f.name for f in files for k in load_file(f)}
        assert index["metadata"]["total_size"] == sum(told)
    for file in files:
        head = file.read_bytes()
        size = int.from_bytes(head[:8], "little")
        told_of = {k: v for k, v in json.loads(head[8 : 8 + size]).items() if k != "__metadata__"}
        assert size % 8 == 0  # and so every tensor is aligned to its own width
        assert all(v["data_offsets"][0] % DTYPES[v["dtype"]].itemsize == 0 for v in told_of.values())
        inside = [v.nbytes for v in load_file(file).values()]
        assert sum(inside) <= shard_bytes or len([n for n in inside if n]) == 1


def test_one_file_with_a_note(tmp_path: Path) -> None:
    told: list[int] = []
    write_file(tmp_path / "x", items(state()), told.append, {"note": "a"})
    found = load_file(tmp_path / "x")
    assert found.keys() == state().keys() and all(same(found[k], v) for k, v in state().items())
    assert sum(told) == sum(v.nbytes for v in state().values())
    assert read_metadata(tmp_path / "x") == {"format": "pt", "note": "a"}
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_metadata(tmp_path / "x")


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    whole_state = {k: v.contiguous() for k, v in state().items()}
    save_file(whole_state, tmp_path / "model.safetensors")
    read = Weights(find(tmp_path))
    assert read.entries.keys() == whole_state.keys() and read.bytes == sum(v.nbytes for v in whole_state.values())
    for k, v in whole_state.items():
        assert same(read.read(k), v) and read.entries[k].shape == tuple(v.shape)


def test_a_large_tensor_is_cast_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE", 7)
    x = torch.randn(5, 9)
    told: list[int] = []
    write(tmp_path, "x", items({"x": x}, torch.float16), told.append)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], x.half()) and max(told) == 14


def test_one_file_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x", items({f"{i}": torch.full((4,), float(i)) for i in range(6)}), shard_bytes=32)
    opened: list[Path] = []
    real = weights._reader
    read = Weights(find(tmp_path))
    monkeypatch.setattr(weights, "_reader", lambda file: opened.append(file) or real(file))
    assert [read.read(f"{i}")[0].item() for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(opened) == len(set(opened)) == 3


def test_what_goes_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> pytest.RaisesExc[ValueError]:
        return pytest.raises(ValueError, match=message)

    with refused("x is .2,.; announced as .3,."):
        write(tmp_path, "x", [Item("x", (3,), torch.float32, lambda: torch.zeros(2))])
    with refused("holds 2 sets of weights; name one file"):
        for name in "ab":
            save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        (tmp_path / "x.safetensors").unlink()
        find(tmp_path)
    (tmp_path / "s").mkdir()
    index = tmp_path / "s" / "model.safetensors.index.json"
    for broken, why in (
        ("{", "is JSON that ends too early; it was torn; expected an index of shards"),
        ("[]", "is no JSON object; expected an index of shards"),
        ('{"weight_map": 3}', "is no index of shards: its weight_map names no files"),
    ):
        index.write_text(broken)
        with refused(f"^weights: {index} {why}$"):
            find(tmp_path / "s")
    index.write_bytes(codecs.BOM_UTF8 + b'{"weight_map": {"x": "gone.safetensors"}}')
    with refused("names 1 files that are not there; first gone.safetensors"):
        find(tmp_path / "s")
    if Path("/dev/full").exists():
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "x.safetensors").symlink_to("/dev/full")
        with refused("x.safetensors cannot be written: No space left on device"):
            write(tmp_path / "d", "x", items({"x": torch.zeros(10**5)}))


def test_of_two_state_dicts_it_is_said_which_is_read(tmp_path: Path) -> None:
    """As a trainer's own checkpoints have them; the optimizer's entry is none."""
    file, own = tmp_path / "a.pth", {"x": torch.zeros(2)}
    torch.save({"state_dict": own, "state_dict_ema": {"x": torch.ones(2)}, "optimizer": {}}, file)
    with pytest.warns(UserWarning, match=r"a.pth holds state_dict and state_dict_ema; state_dict is read"):
        assert torch.equal(Weights([file]).read("x"), own["x"])
