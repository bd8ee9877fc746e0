"""The plan's figures against counted and measured ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import cache_settings
from planned import changed, small_plans
from text_models import TextModel, every_text_model
from training import train

from bench.meters import Count, Held
from bench.providers import _model
from emf.cli.main import main
from emf.conditioning.load import load
from emf.model.transformer import Transformer
from emf.network.build import build
from emf.network.outline import outline
from emf.recipes import RECIPES, SAMPLES, digits
from emf.train.costs import activation_bytes, counted, forward_flops
from emf.train.hardware import Hardware
from emf.train.plan import CAUSAL, GIB, Part, Plan, plan
from emf.train.plan_tables import show
from emf_kernels import Dual, Op, backend

# channels, text tokens and layers in other proportions
SIZES = [((2, (1, 64), 2, 32, 3), 6), ((2, (1, 64), 1, 48, 2), 20), ((4, (2, 64), 1, 96, 4), 11)]


@pytest.mark.parametrize(
    ("size", "condition", "checkpointing"), [(*SIZES[0], True), (*SIZES[1], False), (*SIZES[2], False)]
)
def test_activations_are_what_the_kernels_keep(
    size: tuple, condition: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes held for backward of a dual pass, in Triton's interpreter, within 10 %."""
    torch.manual_seed(0)
    config = replace(_model(*size), checkpointing=checkpointing)
    net, n = Transformer(config), 2
    tokens = config.sample_size**2
    z, c = (
        torch.randn(n, 32, config.sample_size, config.sample_size),
        torch.randn(n, condition, config.caption_channels),
    )
    t = torch.rand(n)
    held = Held({p.untyped_storage().data_ptr() for p in net.parameters()})
    monkeypatch.setattr(Op, "backend_for", lambda op, x: "triton" if op.triton else "reference")  # as on a GPU
    with held.watch():
        net(Dual(z, z[:1]), Dual(t, t[:1]), t / 2, c).primal.sum()
        measured = held.peak
    a = activation_bytes(config, tokens, condition, itemsize=4)
    want = n * (config.num_layers * a["input" if checkpointing else "block"] + a["rest"])
    assert measured == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(("size", "condition"), SIZES)
def test_operations_are_what_is_counted(size: tuple, condition: int) -> None:
    config, n = _model(*size), 2
    net = Transformer(config)
    z, c, t = (
        torch.randn(n, 32, config.sample_size, config.sample_size),
        torch.randn(n, condition, config.caption_channels),
        torch.rand(n),
    )
    with torch.no_grad(), backend("reference"), Count() as count:
        net(z, t, t / 2, c)
    assert count.flops == pytest.approx(n * forward_flops(config, config.sample_size**2, condition), rel=0.05)


LANGUAGE_MODEL = 1_409_410_048 + 217_210 * 2048
"""BLIP3o-NEXT's, its head tied: counted in its published weights (arXiv 2510.15857)."""
CONNECTOR, GEMMA, DCAE = 10_033_920, 2_614_341_888, 312_250_275
EMBEDDERS = 2 * 35_714_560
BLOCKS = 1_630_025_600
"""What EMF trains of the 1.6B (arXiv 2604.18168)."""


def of(recipe: str, hardware: Hardware | None = None, **changes: Any) -> Plan:
    """The plan of a recipe with fields changed."""
    return plan(changed(RECIPES[recipe](), changes), hardware or Hardware(gpus=8))


@pytest.fixture
def small(tmp_path: Path) -> Any:
    return small_plans(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        (
            "sana-1.5-1.6b",
            [
                Part("transformer", 1_604_641_952 + EMBEDDERS, BLOCKS),
                Part("language model", LANGUAGE_MODEL),
                Part("connector", CONNECTOR),
            ],
        ),
        (
            "blip3o-next-3b",
            [
                Part("transformer", 1_604_641_952 + EMBEDDERS, BLOCKS),
                Part("language model", LANGUAGE_MODEL, LANGUAGE_MODEL),
                Part("connector", CONNECTOR, CONNECTOR),
            ],
        ),
        (
            "sana-1.5-gemma",
            [Part("transformer", 1_604_641_952 + EMBEDDERS, BLOCKS), Part("text encoder", GEMMA)],
        ),
    ],
)
def test_what_a_recipe_holds_and_trains(recipe: str, parts: list[Part]) -> None:
    """SANA-1.5's own counts and EMF's two embedders, and those of the published text encoders."""
    assert of(recipe).parts == parts
    if recipe == "sana-1.5-1.6b":
        larger = of(recipe, transformer=dict(num_layers=60))
        assert larger.parts[0].parameters == 4_721_825_952 + EMBEDDERS


def test_images_are_encoded_by_what_the_run_holds_too(small: Any, tmp_path: Path) -> None:
    cache = cache_settings(tmp_path / "cache")
    images = small("sana-1.5-1.6b", data=dict(sources=(str(tmp_path / "a.tar"),)))
    assert images.parts[-2] == Part("autoencoder", DCAE) and images.parts[-1].name == "image tokenizer"
    assert images.rows[0]["beside"] == pytest.approx(4 * sum(p.parameters for p in images.parts[-2:]) / GIB)
    assert images.flops["autoencoder"] > 128 * 1e12 and images.flops["image tokenizer"] > 0
    cached = small("sana-1.5-1.6b", data=dict(sources=(str(cache),)))
    latent, ids = 32 * 32 * 32, 4 * 729
    assert (cached.cached, cached.samples, cached.rows[0]["beside"]) == (4 * latent + ids, 7, 0)
    elsewhere = small("sana-1.5-1.6b", condition=dict(scale=3))
    assert (elsewhere.cached, elsewhere.samples) == (2 * latent + 4 * 81, SAMPLES)
    assert of("digits").cached == 0 and "autoencoder" not in elsewhere.flops


def test_distribution_matching_is_planned() -> None:
    """Both flows are held, the fake one is trained, and neither is written with the weights."""
    p, plain = of("digits", match=dict(weight=1.0)), of("digits")
    base, fake = p.parts[-2:]
    assert (base.name, fake.name, base.trained, fake.trained) == ("frozen base", "fake flow", 0, base.parameters)
    assert p.total == plain.total + 2 * base.parameters and p.trained == plain.trained + fake.trained
    assert 0 < p.flops["distribution matching"] < p.flops["transformer"]
    # two moments and the weights of the fake flow are DeepSpeed's; the averaged weights are the sampler's alone
    assert p.checkpoint < plain.checkpoint + 12 * fake.parameters + 1
    assert p.rows[0]["kept"] > plain.rows[0]["kept"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe: str) -> None:
    """And with adapters: less is trained and written, and more is held."""
    p = of(recipe, lora=dict(rank=4))
    assert 0 < p.trained < p.total and [part.name for part in p.parts][1] == "adapters"
    if recipe in ("digits", "sana-1.5-1.6b"):
        full = of(recipe)
        assert p.trained < full.trained and p.total > full.total and p.checkpoint < full.checkpoint


@pytest.mark.parametrize(
    "changes",
    [{}, dict(freeze_encoder=False), dict(lora=dict(rank=2)), dict(trained=("transformer.caption_", "encoder."))],
)
def test_an_outline_is_what_is_built(changes: dict[str, Any]) -> None:
    config = replace(changed(digits(), changes), init=None)

    def told(network: Any) -> dict[str, Any]:
        return {name: (tuple(p.shape), p.requires_grad) for name, p in network.named_parameters()}

    outlined = outline(config)
    assert told(outlined) == told(build(config)) and all(p.is_meta for p in outlined.parameters())


@every_text_model
def test_an_encoder_is_outlined_by_its_folder(text_model: TextModel, tmp_path: Path) -> None:
    """Names and shapes are those of the encoder that is loaded from there."""
    model, tokenizer = text_model()
    kind: Any = text_model.__name__
    for part, name in ((model, "text_encoder"), (tokenizer, "tokenizer")):
        part.save_pretrained(tmp_path / name)
    condition = dict(kind=kind, folder=tmp_path)
    changes = dict(transformer=dict(num_layers=1, caption_channels=16), condition=condition)
    config = changed(RECIPES["sana-1.5-gemma"](), changes)
    loaded = load(kind, tmp_path, **(dict(length=40) if kind == "clip" else {}))
    outlined = outline(config).encoder
    shapes = [{k: tuple(p.shape) for k, p in m.named_parameters()} for m in (outlined, loaded)]
    assert shapes[0] == shapes[1]
    assert plan(config, Hardware(8)).flops["text encoder"] > 0


def test_stages_split_what_they_say() -> None:
    p = of("sana-1.5-1.6b")
    first, last = p.rows[0], p.rows[3]
    assert p.micro_batch == 1 and p.stage == 2
    assert last["weights"] == pytest.approx(first["weights"] / 8) and p.rows[1]["weights"] == first["weights"]
    assert p.rows[1]["optimizer"] == pytest.approx(first["optimizer"] / 8)
    assert p.rows[1]["gradients"] == first["gradients"]
    assert p.rows[2]["gradients"] == pytest.approx(first["gradients"] / 8)
    assert first["recomputed"] < first["kept"] / 4
    assert p.needs(2, "kept") < 24 < of("sana-1.5-1.6b", Hardware(1), zero=dict(accumulation=128)).needs(2, "kept")
    host = of("sana-1.5-1.6b", zero=dict(offload=True), optim=dict(ema=0.9)).rows[2]
    assert host["optimizer"] == 0 and host["host"] == pytest.approx(p.rows[2]["optimizer"])
    assert first["ema"] == 0 and host["ema"] == pytest.approx(4 * p.trained / 8 / GIB)


def test_the_kinds_of_a_step(small: Any) -> None:
    """Of the transformer's operations: a forward and a backward are 3, a tangent 1 for each sample that has one."""
    none, every = (small("sana-1.5-1.6b", flow=dict(share=(s, s))) for s in (0.0, 1.0))
    forward = none.flops["transformer"] / 3
    assert every.flops["tangents"] == pytest.approx(forward) and none.flops["tangents"] == 0
    assert small("sana-1.5-1.6b").flops["tangents"] == pytest.approx(forward / 2)
    again = small("sana-1.5-1.6b", transformer=dict(num_layers=2, checkpointing=True))
    assert again.flops["transformer"] == pytest.approx(4 * forward)
    lora = small("sana-1.5-1.6b", lora=dict(rank=4))
    assert lora.flops["transformer"] == pytest.approx(2 * forward, rel=1e-2)
    difference = small("sana-1.5-1.6b", flow=dict(derivative="difference", guidance=2.0))
    assert "tangents" not in difference.flops and difference.flops["further evaluations"] == pytest.approx(3 * forward)
    assert difference.flops["text encoder"] == none.flops["text encoder"]  # a step reads its captions once
    own = small("sana-1.5-1.6b", flow=dict(along="network"))  # of the half of the samples that carry a tangent
    assert own.flops["further evaluations"] == pytest.approx(forward / 2)
    tuned, with_loss = (small("blip3o-next-3b", condition=dict(ar_weight=w)) for w in (0.0, 1.0))
    assert tuned.flops["text encoder"] == pytest.approx(3 * none.flops["text encoder"])
    assert (
        with_loss.flops["text encoder"] > tuned.flops["text encoder"] and tuned.rows[0]["kept"] > none.rows[0]["kept"]
    )
    # a product of a weight with a token is two operations, and attention comes on top
    layer = 4 * 256 * 256 + 3 * 256 * 768
    products = 2 * (2 * layer + 256 * 2304 + 2304 * 2304) * 128 * (128 + 2 + 729 + 3)
    assert products < none.flops["text encoder"] < 1.3 * products


def tell_what_is_held() -> None:
    """At a save, bytes of every tensor of the process."""
    import gc

    from emf.train import loop

    save = loop.Training.save

    def told(self: Any, done: int) -> None:
        gc.collect()
        every = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        print("held", sum({s.data_ptr(): s.nbytes() for s in every}.values()), flush=True)
        save(self, done)

    loop.Training.save = told  # type: ignore[method-assign]


@pytest.mark.parametrize(("stage", "dtype", "ranks"), [(0, "float32", 1), (3, "bfloat16", 2)])
def test_a_run_holds_and_writes_what_was_planned(stage: int, dtype: str, ranks: int, tmp_path: Path) -> None:
    """All tensors of all ranks after a step, and all files of a checkpoint."""
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"reduce_bucket_size": 100000}}' if stage else "{}")
    config = changed(digits(), dict(steps=1, batch_size=4, zero=dict(stage=stage, dtype=dtype, json=own)))
    p = plan(changed(config, dict(run=dict(eval_every=0))), Hardware(gpus=ranks))
    flags = f"--steps 1 --batch-size 4 --run.eval-every 0 --zero.stage {stage} --zero.dtype {dtype} --zero.json {own}"
    arguments = ["digits", *flags.split(), "--out", str(tmp_path / "run")]
    result = train(tmp_path, *arguments, ranks=ranks, before=tell_what_is_held)
    assert result.code == 0, result.text
    held = sum(int(line.split()[1]) for line in result.text.splitlines() if line.startswith("held "))
    kinds = ["weights", "optimizer", "ema"]
    kinds += ["gradients", "buffers"] if stage == 3 else []  # which ZeRO 3 keeps between steps
    assert held == pytest.approx(ranks * GIB * sum(p.rows[stage][k] for k in kinds), rel=0.05)
    written = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.is_file())
    assert written == pytest.approx(p.checkpoint, rel=0.05)


def test_what_torch_keeps_is_counted_on_meta() -> None:
    """Bytes that a language model holds for backward: those of the same model on the CPU."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ids = torch.zeros(1, 40, dtype=torch.int64)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    held = Held({p.untyped_storage().data_ptr() for p in model.parameters()})
    with held.watch():
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        measured = held.peak
    with torch.device("meta"):
        outlined = Qwen3ForCausalLM(Qwen3Config(**sizes))

    def read() -> Any:
        return outlined.model(input_ids=ids.to("meta"), attention_mask=CAUSAL, use_cache=False).last_hidden_state

    flops, kept = counted(outlined, read)
    assert kept == pytest.approx(measured, rel=0.1) and flops > 0 and states.requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(gpu="abacus"), "plan: no GPU 'abacus'"),
        (dict(gpus=0), "plan: --gpus 0 must be at least 1"),
        (dict(memory=-1.0), "plan: --memory -1.0"),
        (dict(memory=float("nan")), "plan: --memory nan"),
        (dict(mfu=0.0), "plan: --mfu 0.0"),
        (dict(mfu=2.0), "plan: --mfu 2.0"),
    ],
)
def test_hardware_that_cannot_be_is_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError) as told:
        Hardware(**wrong)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "gpus", "message"),
    [
        (dict(), 3, "no multiple of 3 ranks"),
        (dict(zero=dict(stage=0, offload=True)), 8, "zero.offload needs"),
        (dict(lora=dict(alpha=3)), 8, "lora.alpha 3 has no effect"),
        (dict(compile=True, zero=dict(stage=3)), 8, "compile True does not go with ZeRO 3"),
        (dict(graphs=True, zero=dict(accumulation=1)), 8, "graphs True is for micro-batches of 1 or 2, not 16"),
        (dict(trained=("decoder.",)), 8, "no weight's name begins with decoder."),
        (dict(condition=dict(kind="t5")), 8, "nothing tells the sizes of the t5 encoder"),
        (dict(transformer=dict(caption_channels=7), condition=dict(kind="gemma")), 8, "states of 2304 channels"),
    ],
)
def test_a_run_that_would_be_refused_is_not_planned(changes: dict, gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        of("sana-1.5-1.6b", Hardware(gpus), **changes)
    assert "\n" not in str(told.value)


def test_a_plan_is_shown(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the command shows it, which takes what `emf train` takes; the run's own stage is marked."""
    show(small("sana-1.5-1.6b"), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    for word in (
        "language model",
        ">2",
        "this run: ZeRO 2, activations kept",
        "FLOP (transformer",
        "GiB free at",
        "170,000 of them",
    ):
        assert word in said, word
    (tmp_path / "own.json").write_text('{"gradient_clipping": 0.5}')
    before, sys.argv = sys.argv, ["emf", "plan", "digits", "--out", str(tmp_path / "run"), "--resume", "--steps", "7"]
    sys.argv += ["--zero.json", str(tmp_path / "own.json"), "--gpus", "2"]
    try:
        main()
    finally:
        sys.argv = before
    said = " ".join(capsys.readouterr().out.split())
    for word in (">0", "2 GPUs, micro-batch 32", "7 steps", "overrules the config: gradient_clipping 0.5"):
        assert word in said, word
    assert not (tmp_path / "run").exists()
