"""TA-Tok against its arithmetic in plain torch, and the files that it is read from."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import ta_tok_file
from torch import Tensor
from torch.nn import functional as F

from emf.conditioning.ta_tok import load_ta_tok


class EasyDict(dict):
    """As the published file's arguments: a dict subclass whose module is not installed."""

    __module__ = "easydict"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for k, v in self.items():
            self[k] = EasyDict(v) if type(v) is dict else v
            setattr(self, k, self[k])


class Opaque:
    """Something in a file that is no weight."""


def plain_codes(s: dict[str, Tensor], images: Tensor, normalized: bool, pool: int) -> Tensor:
    """TA-Tok's encoder in plain torch, from the file's weights, in float64."""
    s = {k: v.double() for k, v in s.items()}

    def linear(name, x):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)

    e = "encoder.embeddings."
    x = F.conv2d(images.double(), s[e + "patch_embedding.weight"], s[e + "patch_embedding.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2) + s[e + "position_embedding.weight"]
    for i in range(2):  # of 3: the last layer's output is not used
        layer = f"encoder.encoder.layers.{i}."
        h = norm(layer + "layer_norm1", x)
        q, k, v = (linear(f"{layer}self_attn.{n}_proj", h).unflatten(-1, (2, 16)).transpose(1, 2) for n in "qkv")
        h = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(layer + "self_attn.out_proj", h)
        h = F.gelu(linear(layer + "mlp.fc1", norm(layer + "layer_norm2", x)), approximate="tanh")
        x = x + linear(layer + "mlp.fc2", h)
    side = 6 // pool
    x = x.reshape(-1, side, pool, side, pool, 32).mean((2, 4)).flatten(1, 2)
    z = linear("bottleneck.in_linear", linear("encode_task_layer.0", x).tanh())
    table = linear("bottleneck.regularizer.embedding_proj", s["bottleneck.regularizer.embedding.weight"])
    if normalized:
        z, table = z / z.norm(dim=-1, keepdim=True), table / table.norm(dim=-1, keepdim=True)
        return (z @ table.T).argmax(-1)
    return (z[:, :, None] - table).norm(dim=-1).argmin(-1)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_ta_tok_against_plain_torch(tmp_path: Path, normalized: bool, pool: int) -> None:
    state = ta_tok_file(tmp_path / "ta_tok.pth", normalized=normalized, pool=pool)
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)(images)
    assert codes.shape == (4, (6 // pool) ** 2) and len(codes.unique()) > 3
    assert torch.equal(codes, plain_codes(state, images, normalized, pool))
    if pool == 1:
        assert load_ta_tok(tmp_path / "ta_tok.pth", heads=2, scale=3)(images).shape == (4, 4)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.vision_model."])
def test_ta_tok_resizes(tmp_path: Path, prefix: str) -> None:
    ta_tok_file(tmp_path / "ta_tok.pth", prefix=prefix)
    model = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (model(doubled) == model(images)).float().mean() > 0.2  # smoothed, yet alike
    with pytest.raises(ValueError, match=r"images is \(3, 24, 24\); expected \[B, 3, H, W\]"):
        model(images[0])


def test_ta_tok_reads_a_saved_easydict_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    EasyDict.__qualname__ = "EasyDict"
    monkeypatch.setitem(sys.modules, "easydict", module)
    state = ta_tok_file(tmp_path / "ta_tok.pth", kind=EasyDict, pool=2)
    monkeypatch.delitem(sys.modules, "easydict")
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    codes = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)(images)
    assert torch.equal(codes, plain_codes(state, images, True, 2))
    assert not [w for w in recwarn if "runs code" in str(w.message)]


def test_ta_tok_warns_before_it_runs_code(tmp_path: Path) -> None:
    ta_tok_file(tmp_path / "ta_tok.pth", extra={"note": Opaque()})
    with pytest.warns(UserWarning, match="holds more than weights; reading it runs code from it"):
        load_ta_tok(tmp_path / "ta_tok.pth", heads=2)


def test_ta_tok_errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ta_tok.pth"
    cases = {"no file": lambda: None}
    cases["not a file of torch.save"] = lambda: path.write_bytes(b"text, not a pickle")
    cases['has no ["model"]["args"]'] = lambda: torch.save({"weights": {}}, path)
    regularizer = {"bottleneck": {"args": {"regularizer": {"args": {}}}}}
    cases["holds no TA-Tok weights"] = lambda: torch.save({"model": {"args": regularizer, "sd": {}}}, path)
    for message, write in cases.items():
        write()
        with pytest.raises(ValueError) as raised:
            load_ta_tok(path)
        assert message in str(raised.value) and "\n" not in str(raised.value)
    state = ta_tok_file(path)
    del state["encode_task_layer.0.bias"]
    torch.save({"model": {"args": regularizer | {"input_size": 24}, "sd": state}}, path)
    with pytest.raises(ValueError, match=r"of another model; encode_task_layer.0.bias is missing"):
        load_ta_tok(path, heads=2)
