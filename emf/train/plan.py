"""What a training run needs before it is started (`emf plan`): what it holds by ZeRO stage, trains, computes, writes.

A plan is of a config, as `emf train` has it. Weights are counted on the meta device: none is read. Everything is for
one GPU unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf.config import Config
from emf.data.cache import read_settings
from emf.data.feed import caches_of, check_sources
from emf.data.sources import PACKED, count_samples, is_there, parse_source
from emf.idle import check_idle
from emf.model.autoencoder import dcae_config
from emf.model.text_to_image import TextToImage
from emf.network.outline import outline, tokens_of
from emf.recipes import SAMPLES
from emf.train.costs import activation_bytes, counted, forward_flops
from emf.train.faster import check_quick
from emf.train.hardware import PEAK_FLOPS, Hardware
from emf.train.opening import checkpoint_bytes, in_steps
from emf.train.paths import fetched
from emf.train.zero import check_monitors, engine_config, exchanged
from emf.weights.checkpoints import saved_names
from emf.weights.start import check_base, with_encoder

GIB = 2**30
TA_TOK = 500_000_000
"""Parameters of BLIP3o-NEXT's image tokenizer, about: SigLIP2's so400m and its codebook. Its file does not say them
without being read."""
DCAE: dict[str, Any] = dict(
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
    decoder_layers_per_block=[3, 3, 3, 3, 3, 3],
    encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    latent_channels=32,
    scaling_factor=0.41407,
)
"""SANA's autoencoder, f32c32 (arXiv 2410.10733), where no folder is there to tell."""


CAUSAL: Any = {"full_attention": None}
"""A mask for Qwen3 of which nothing is computed: on the meta device no value can be looked at."""


@dataclass(frozen=True)
class Part:
    """A part of what a run holds."""

    name: str
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class Plan:
    """What was asked, and what it needs."""

    config: Config
    hardware: Hardware
    stage: int
    """ZeRO stage of the run, a DeepSpeed JSON's included."""
    micro_batch: int
    parts: list[Part]
    rows: list[dict[str, Any]]
    """A ZeRO stage each: GiB of weights, gradients, optimizer, ema, buffers (DeepSpeed's for communication) and beside
    (what is held whole and not trained: autoencoder, image tokenizer); activations kept and recomputed; `host`, GiB of
    a rank in the host's memory."""
    flops: dict[str, float]
    """Operations of an optimizer step, over all GPUs, by what computes."""
    checkpoint: float
    """Bytes of a checkpoint; `run.keep` of them stay, and there is one more while it is written."""
    cached: int
    """Bytes of a sample in a cache; 0 where the run has none."""
    samples: int
    """How many the data hold, or, where that is not known, how many EMF was trained on."""
    assumed: str
    """Why that is not known; empty where it is."""
    images: bool
    """The run encodes images as it goes."""

    @property
    def total(self) -> int:
        return sum(p.parameters for p in self.parts)

    @property
    def trained(self) -> int:
        return sum(p.trained for p in self.parts)

    @property
    def step_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def step_seconds(self) -> float:
        return self.step_flops / (self.hardware.gpus * self.hardware.mfu * PEAK_FLOPS[self.hardware.gpu])

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.config.steps * self.step_seconds / 86400

    @property
    def kind(self) -> str:
        """Which activations the run has."""
        return "recomputed" if self.config.transformer.checkpointing else "kept"

    def needs(self, stage: int, kind: str) -> float:
        """GiB of a GPU at a ZeRO stage, with activations kept or recomputed."""
        row = self.rows[stage]
        return float(sum(row[k] for k in STATE) + row[kind])


STATE = ("weights", "gradients", "optimizer", "ema", "buffers", "beside")


def plan(config: Config, hardware: Hardware | None = None) -> Plan:
    """Plan the run of a config. Raises ValueError where the run would be refused for its settings; folders that are not
    there are no fault, a plan is made elsewhere too."""
    hardware, config = hardware or Hardware(), with_encoder(fetched(config, sizes=True))
    check_idle(config)
    check_base(config)
    check_monitors(config)
    cached, samples, assumed = _cache(config)
    config = in_steps(config, samples)
    settings = engine_config(config, hardware.gpus)
    check_quick(config, settings, torch.device("cuda"))
    half = settings["bf16"]["enabled"]
    network = outline(config).to(torch.bfloat16 if half else torch.float32)
    stage, micro = settings["zero_optimization"]["stage"], settings["train_micro_batch_size_per_gpu"]
    images, beside = _encodes(config), list[Part]()
    encoding: dict[str, float] = {}
    if images:
        beside, encoding = _beside(config)
    parts = [*_parts(network), *beside]
    trained = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    state: dict[str, float] = dict(total=sum(p.numel() for p in network.parameters()), trained=sum(trained.values()))
    flops, text_kept = _text(config, network, micro)
    kept = _activations(config, network, micro, 2 if half else 4, text_kept)
    rows = [
        _row(at, config, hardware, settings, state | dict(beside=4 * sum(p.parameters for p in beside))) | kept
        for at in range(4)
    ]
    flops = _transformer_flops(config, network) | flops | {k: config.batch_size * v for k, v in encoding.items()}
    return Plan(
        config,
        hardware,
        stage,
        micro,
        parts,
        rows,
        flops,
        _checkpoint(config, network, half, stage),
        cached,
        samples,
        assumed,
        images,
    )


def _parts(network: TextToImage) -> list[Part]:
    """What the network is made of."""

    def part(name: str, chosen: Mapping[str, Tensor]) -> Part:
        return Part(
            name, sum(p.numel() for p in chosen.values()), sum(p.numel() for p in chosen.values() if p.requires_grad)
        )

    transformer = dict(network.transformer.named_parameters())
    adapters = {k: p for k, p in transformer.items() if ".lora_" in k}
    found = [part("transformer", {k: p for k, p in transformer.items() if k not in adapters})]
    found += [part("adapters", adapters)] if adapters else []
    names = {"language_model": "language model", "model": "text encoder"}
    for name, module in network.encoder.named_children():
        found.append(part(names.get(name, name), dict(module.named_parameters())))
    for name, said in (("base", "frozen base"), ("fake", "fake flow")):
        if hasattr(network, name):
            found.append(part(said, dict(getattr(network, name).named_parameters())))
    return found


def _encodes(config: Config) -> bool:
    """Whether the run encodes images as it goes: where its sources are no cache. One that is not there is taken for a
    cache, unless its name is that of a tar, a Parquet file or a pattern."""
    paths = [parse_source(text).path for text in config.data.sources]
    if not paths or caches_of(config.data):
        return False
    packed = any(c in paths[0] for c in "*?[{") or paths[0].endswith(tuple(f".{kind}" for kind in PACKED))
    return packed or len(paths) > 1 or Path(paths[0]).exists()


def _beside(config: Config) -> tuple[list[Part], dict[str, float]]:
    """(the networks that encode images in a run, in float32; operations of a sample by their names)."""
    found, flops, vae = list[Part](), dict[str, float](), config.data.vae
    if config.transformer.in_channels != 3:
        from diffusers import AutoencoderDC

        with torch.device("meta"):
            settings = dcae_config(vae)[1] if vae and vae.is_dir() else DCAE
            module = AutoencoderDC.from_config(settings)
        size = config.data.size
        found.append(Part("autoencoder", sum(p.numel() for p in module.parameters())))
        flops["autoencoder"], _ = counted(module, lambda: module.encode(torch.empty(1, 3, size, size)))
    if config.condition.kind == "blip3o":
        found.append(Part("image tokenizer", TA_TOK))
        flops["image tokenizer"] = 2.0 * TA_TOK * 27**2
    return found, flops


def _text(config: Config, network: TextToImage, micro: int) -> tuple[dict[str, float], float]:
    """({"text encoder": operations of a step}, bytes that it keeps for backward at a micro-batch). A step reads its
    captions once. Not counted: the connector once more for each further evaluation of the network, and the null
    caption, which an encoder in training reads beside where guidance in the target asks for it."""
    (length, _), encoder = tokens_of(config), network.encoder
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")

    def read() -> Any:
        if config.condition.kind == "small":
            return encoder(ids, torch.ones_like(ids, dtype=torch.bool))
        if config.condition.kind != "blip3o":
            return encoder.model(input_ids=ids).last_hidden_state
        states = encoder.language_model.model(input_ids=ids, attention_mask=CAUSAL, use_cache=False).last_hidden_state
        return encoder.connector(states)

    forward, kept = counted(encoder, read)
    total = sum(p.numel() for p in encoder.parameters())
    share = sum(p.numel() for p in encoder.parameters() if p.requires_grad) / total
    flops, kept = forward * (1 + (1 + share if share else 0)), micro * kept
    if config.condition.ar_weight:
        sizes = encoder.language_model.config
        # the logits of one row at a time, in bfloat16 and float32, with their softmax and gradient; made again in
        # backward
        flops += 2 * length * sizes.hidden_size * sizes.vocab_size * (2 + (2 if share else 0))
        kept += length * sizes.vocab_size * (2 + 3 * 4)
    return {"text encoder": config.batch_size * flops}, kept


def _further(config: Config) -> float:
    """Evaluations of the network without gradient that a step's loss asks for, beside the one that is trained. Along
    the network's own velocity, those samples are evaluated that carry a tangent."""
    f = config.flow
    if config.objective != "meanflow":
        return 0
    guided = (f.guidance != 1 or f.kappa != 0) + (f.kappa != 0)
    along = {"jvp": sum(f.share) / 2, "difference": 1, "alpha": 0}[f.derivative] * (f.along == "network")
    return guided + along + {"jvp": 0, "difference": 2, "alpha": 1}[f.derivative]


def _tokens(config: Config) -> int:
    return (config.transformer.sample_size // config.transformer.patch_size) ** 2


def _transformer_flops(config: Config, network: TextToImage) -> dict[str, float]:
    """Operations of a step by name. A gradient by the input costs a forward, one by the weights that share of it which
    is trained."""
    blocks = {k: p for k, p in network.transformer.transformer_blocks.named_parameters() if ".lora_" not in k}
    share = sum(p.numel() for p in blocks.values() if p.requires_grad) / sum(p.numel() for p in blocks.values())
    forward = config.batch_size * forward_flops(config.transformer, _tokens(config), tokens_of(config)[1])
    again = 1 if config.transformer.checkpointing else 0
    flops = {"transformer": forward * (2 + share + again)}
    if config.objective == "meanflow" and config.flow.derivative == "jvp":
        flops["tangents"] = forward * sum(config.flow.share) / 2
    if further := _further(config):
        flops["further evaluations"] = forward * further
    if config.match.weight:
        guided = 2 if config.match.guidance != 1 else 1
        made = (2 + share + again) * sum(config.match.steps) / len(config.match.steps)
        flops["distribution matching"] = _matched(config) * forward * (made + guided + 3)
    return flops


def _matched(config: Config) -> float:
    """Samples of the distribution-matching term for each of MeanFlow's, over the run: where it acts it makes a
    picture with the network, asks the base, and trains the fake flow."""
    return config.match.share * (1 - config.match.begin) if config.match.weight else 0.0


def _activations(config: Config, network: TextToImage, micro: int, itemsize: int, text: float) -> dict[str, float]:
    """GiB of a micro-batch, kept or recomputed, with as many tangents as it can have."""
    sizes, layers = config.transformer, config.transformer.num_layers
    a = activation_bytes(sizes, _tokens(config), tokens_of(config)[1], itemsize)
    carry = 0
    if config.objective == "meanflow" and config.flow.derivative == "jvp" and max(config.flow.share) > 0:
        carry = min(micro, math.floor(micro * max(config.flow.share)) + 1)
    tangent = carry * a["tangent"] + text
    if config.match.weight:  # every step of a picture, and the fake flow
        micro += (max(config.match.steps) + 1) * math.ceil(config.match.share * micro)
    kept = micro * (layers * a["block"] + a["rest"]) + tangent
    # under checkpointing one block is whole at a time, with its gradients beside it
    recomputed = micro * (layers * a["input"] + 2 * a["block"] + a["rest"]) + tangent
    return dict(kept=kept / GIB, recomputed=recomputed / GIB)


def _row(
    stage: int, config: Config, hardware: Hardware, settings: dict[str, Any], state: dict[str, float]
) -> dict[str, float]:
    """GiB of what is held at a ZeRO stage, without activations."""
    ranks, half, offload = hardware.gpus, settings["bf16"]["enabled"], config.zero.offload and stage > 0
    size, total, trained = 2 if half else 4, state["total"], state["trained"]
    by_weights, by_gradients, by_states = (ranks if stage >= least else 1 for least in (3, 2, 1))
    # two moments; and float32 weights, which ZeRO keeps beside float32 ones too
    optimizer = trained * (12 if half or stage else 8) / by_states
    ema = 4 * trained / by_states if config.optim.ema else 0.0
    held = dict(
        weights=size * total / by_weights,
        gradients=size * trained / by_gradients,
        optimizer=0.0 if offload else optimizer,
        ema=0.0 if config.optim.ema_cpu else ema,
        buffers=size * exchanged(settings, stage, int(total), int(trained)),
        beside=state["beside"],
        host=(optimizer if offload else 0.0) + (ema if config.optim.ema_cpu else 0.0),
    )
    return dict(stage=stage) | {k: v / GIB for k, v in held.items()}


def _checkpoint(config: Config, network: TextToImage, half: bool, stage: int) -> float:
    """Bytes of a checkpoint."""
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    return float(checkpoint_bytes(sizes, saved_names(network, config), trained, half=half, stage=stage))


def _cache(config: Config) -> tuple[int, int, str]:
    """(bytes of a sample in a cache, how many samples the data hold, why that is not known). Raises ValueError where
    the data are there and a run would not take them."""
    sources, assumed = [parse_source(text) for text in config.data.sources], ""
    if config.condition.kind == "small":
        return 0, 0, ""
    absent = next((source.path for source in sources if not is_there(source)), None)
    if sources and absent is None:
        check_sources(config.batches)
    every = [read_settings(Path(source.path)) for source in caches_of(config.data)]
    if not every:
        found = count_samples(sources, config.data.listings) if sources and absent is None else None
        if found is None:
            assumed = (
                f"{absent} is not here" if absent else "listing the tars takes long" if sources else "no data are named"
            )
        every = [dict(dtype="bfloat16", counts=[SAMPLES if found is None else found])]
    latent = math.prod(config.batches.latent) * (2 if every[0]["dtype"] == "bfloat16" else 4)
    ids = 4 * (27 // config.condition.scale) ** 2 if config.condition.kind == "blip3o" else 0
    return latent + ids, sum(sum(one["counts"]) for one in every), assumed
