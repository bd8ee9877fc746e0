"""The kernels as Hugging Face's package of kernels loads them: from a folder, under a name of their own, and as layers
of a model that knows nothing of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("kernels", reason="Hugging Face's package kernels is not installed")

LOADED = """
import importlib, json, sys
from pathlib import Path
import torch
from torch import nn

hub, made = importlib.import_module("kernels"), Path(sys.argv[1])
ours = hub.get_local_kernel(made)
told, g = {"name": ours.__name__, "file": ours.__file__}, torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
plain = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w

x, x_dot, w = draw(3, 5, 8), draw(2, 5, 8), draw(8)
want, want_dot = torch.func.jvp(lambda x: plain(x, w), (x[:2],), (x_dot,))
for backend in ("reference", "triton"):
    with ours.backend(backend):
        y = ours.rmsnorm(ours.Dual(x.float(), x_dot.float()), w.float())
    told[backend] = [float((y.primal - plain(x, w)).abs().max()), float((y.tangent - want_dot).abs().max())]

class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attend = Norm(8, eps=1e-5), Attend()

    def forward(self, x):
        q = self.norm(x)
        return self.attend(q, q, x, is_causal=True)

@hub.use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.RMSNorm):
    pass

@hub.use_kernel_forward_from_hub("ScaledDotProductAttention")
class Attend(nn.Module):
    def forward(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)

model, z, z_dot = Stranger(), draw(2, 3, 4, 8).float(), draw(2, 3, 4, 8).float()
nn.init.normal_(model.norm.weight, generator=g)
with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
    want = torch.func.jvp(model, (z,), (z_dot,))
layers = {n: {"cpu": hub.LocalLayerRepository(made, layer_name=n)} for n in ("RMSNorm", "ScaledDotProductAttention")}
with hub.use_kernel_mapping(layers):
    hub.kernelize(model, device="cpu", mode=hub.Mode.TRAINING)
told["forwards"] = sorted(m.forward.__func__.__module__ for m in (model.norm, model.attend))
got = torch.func.jvp(model, (z,), (z_dot,))
told["stranger"] = [float((a - b).abs().max()) for a, b in zip(got, want)]
told["gradient"] = float(torch.autograd.grad(model(z).sum(), model.norm.weight)[0].norm())

class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(w.float()), 1e-5

llama = ours.layers.LlamaRMSNorm.forward(Llama(), z)
told["llama"] = float((llama - plain(z.double(), w)).abs().max())
rust = importlib.import_module("kernels._rust")
told["backends"] = [str(b) for b in rust.Build.open(sys.argv[2]).general.backends]
for variant in (made / "build").iterdir():
    found = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant)
    rust.Metadata.read_from_file(variant / "metadata.json").digest.validate(found)
told["ours"] = [name for name in sys.modules if name.startswith("emf_kernels")]
print(json.dumps(told))
"""


def alone(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process in the folder that runs the code; our package is not on its path."""
    path = os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not p.startswith(str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that builds the folder and loads it; our package is not on its path."""
    out = tmp_path_factory.mktemp("hub")
    script = str(ROOT / "kernels" / "hub_build.py")
    built = subprocess.run([sys.executable, script, str(out)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert [Path(line).name for line in built.stdout.splitlines()] == ["torch-cpu", "torch-cuda"]
    again = subprocess.run([sys.executable, script, str(out)], capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("error: hub_build: ") and again.stderr.count("\n") == 1
    done = alone(LOADED, out, str(out), str(ROOT / "kernels"))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"out": str(out)}


def test_values_and_tangents_under_a_name_of_its_own(told: dict[str, Any]) -> None:
    assert told["file"].startswith(told["out"]) and told["name"].startswith("_emf_kernels_cpu_")
    assert told["ours"] == []  # the copy imports nothing of an installed package
    for backend in ("reference", "triton"):
        assert max(told[backend]) < 2e-6, backend


def test_layers_of_a_model_that_knows_nothing_of_ours(told: dict[str, Any]) -> None:
    assert told["forwards"] == [f"{told['name']}.hub_layers"] * 2
    assert max(told["stranger"]) < 2e-6 and told["gradient"] > 0 and told["llama"] < 2e-6


def test_the_build_file_is_one_of_that_project(told: dict[str, Any]) -> None:
    assert [name.lower() for name in told["backends"]] == ["cpu", "cuda"]


def test_the_example_of_the_hub_is_right(told: dict[str, Any]) -> None:
    """kernels/README.md's, with the folder that was built."""
    text = (ROOT / "kernels" / "README.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if '"OUT"' in block)
    done = alone(example.replace('"OUT"', '"."') + "print(tuple(y_dot.shape))", Path(told["out"]))
    assert done.returncode == 0 and done.stdout == "(2, 64)\n", done.stderr[-3000:]
