"""The one way from captions to images: captions -> condition -> latents -> decoder -> images.

`emf generate`, validation during training, the benchmarks' pictures, the analyses and the paper in miniature call
Sampler. EMFPipeline, whose caller may bring conditions and noise of its own, goes the same way by the same functions:
`conditions_of`, `noise_of`, `latents_of`, `check_finite`, `to_uint8`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from emf.config import Config, Scale
from emf.device import device as find_device
from emf.errors import NotFinite
from emf.flow import guided, sample
from emf.idle import refuse_idle
from emf.model.autoencoder import Latent, load_dcae
from emf.model.layers import States
from emf.model.text_to_image import TextToImage
from emf.sample.ahead import GoOn, Result, nothing, work_aside
from emf.sample.image_batches import Batch, batches_of
from emf.sample.image_tokens import tokenize
from emf.sample.sampling_settings import Pixels, Settings, default_guidance, latent_shape
from emf.sample.token_engine import Engine, begin, find_engine
from emf.weights.checkpoints import WEIGHTS, step_of
from emf.weights.folders import at_weights, load, load_velocity
from emf.weights.hub import AUTOENCODER, ENCODER, named
from emf.weights.tensors import module_stamp

TOKENS_APART = 2**40  # is added to an image's seed for its image tokens, which must not follow its noise


@torch.no_grad()
def conditions_of(
    encoder: Any,
    captions: Sequence[str],
    seeds: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    engine: Engine | None = None,
) -> tuple[States, States]:
    """(condition, null) of captions, each with the mask of its own: what is attended to where there is no caption is
    not what the caption's length says. seeds, engine: see `tokenize`. Both are the same at every step, so they are made
    once. Raises ValueError on a caption that the encoder cannot read, and where the engine gives no tokens."""
    token_seeds = [TOKENS_APART + n for n in seeds]
    ids, mask = (x.to(device) for x in tokenize(encoder, captions, token_seeds, progress=True, engine=engine))
    (c, kept), (null, null_kept) = encoder(ids, mask, null=True)  # a call, before which accelerate fetches weights
    return (c.to(dtype), kept), (null.to(dtype), null_kept)


def noise_of(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise [n, *shape] float32 on the CPU, each image's by its own seed."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in seeds])


@torch.no_grad()
def latents_of(
    transformer: Any,
    noise: Tensor,
    condition: States,
    null: States,
    *,
    steps: int,
    guidance: float,
    average: bool = True,
) -> Tensor:
    """Latents [B, C, h, w] float32 from noise of this shape.

    transformer: called as Transformer is, in the dtype of the condition's states; the steps between are float32.
    null: the condition without a caption, of the same shape. guidance: of Settings, less what the network has already.
    Raises ValueError on less than one step, and NotFinite where latents hold NaN or inf, with their places.
    """
    dtype = condition[0].dtype

    def velocity(states: States) -> Any:
        return lambda z, t, r: transformer(z.to(dtype), t, r, *states).float()

    latents = sample(guided(velocity(condition), velocity(null), guidance), noise.float(), steps, average)
    return check_finite(latents)


def check_finite(images: Tensor) -> Tensor:
    """Images or latents [n, ...], all of them finite. Raises NotFinite with the places of those that are not: as 8 bits
    they would pass for pictures, and be scored."""
    if bad := (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        raise NotFinite(bad)
    return images


def bad_weight(module: nn.Module | None) -> str | None:
    """The name of the first weight of a network that holds NaN or inf."""
    every = () if module is None else module.named_parameters()
    return next((name for name, x in every if not x.isfinite().all()), None)


class Sampler:
    """A network that gives images of captions, and the autoencoder that decodes them. Sampler.load() reads both.

    What an image depends on: the weights, (settings.seed, its number, its caption), and the settings but `batch`. The
    number is its place in the call unless `numbers` says otherwise. It does not depend on the other images of its
    batch, nor on the size of the batch, the number of threads or the kind of processor, up to rounding: in float32 a
    pixel of the 8-bit picture then differs by at most one level of 255. Sampled again in the same batches, with the
    same number of threads on the same machine, it is the same bit for bit. (BLIP3o-NEXT draws image tokens before the
    image, and rounding can tip one of those where a draw falls on the border of two; the image is then another one.)
    """

    def __init__(
        self,
        config: Config,
        network: TextToImage,
        autoencoder: Latent | None = None,
        settings: Settings | None = None,
        stamp: str = "",
        *,
        source: Path | str = "the network",
        engine: Engine | None = None,
    ) -> None:
        self.config, self.network, self.autoencoder = config, network, autoencoder
        self.settings = settings or Settings()
        """Where a call says nothing else."""
        self.stamp = stamp
        """A digest of the weights: another one means other images."""
        self.source = source
        """Where the weights come from, for errors."""
        self.engine = engine
        """Draws the image tokens, where the encoder does not itself."""
        self.overlaps = engine is not None or self.device.type == "cuda"
        """Whether the text stage of a batch runs while the transformer works on the one before. On a CPU they would
        share the cores, unless the text stage waits for an engine most of the time."""
        self.note = ""
        """Whose instantaneous velocity is sampled, where that is not plainly the run's."""
        self.pooled: int | None = None
        """The scale of the image tokens, where another one than the run's was asked for."""
        self.step: int | None = None
        """Of training, after which the weights were saved; None where they do not say it."""
        self.seconds: dict[str, float] = {}
        """What the stages took so far: text, transformer, decoder. The first overlaps with the others where `overlaps`
        says so."""

    @classmethod
    def load(
        cls,
        run: Path | str,
        vae: Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        flow_matching: bool | None = False,
        *,
        text: Path | None = None,
        ar: str | None = None,
        scale: Scale | None = None,
        beside: Sampler | None = None,
    ) -> Sampler:
        """run: a run, one of its checkpoints, an export, or a folder from emf convert. vae: a diffusers folder with
        the autoencoder; None: that of the run's data, or of the export. dtype: None is float32 on a CPU, bfloat16 on a
        GPU. flow_matching: sample the instantaneous velocity by Euler's method (`average` of Settings), that of the
        run's start where it is there; `note` says whose it is; None: where the run was trained for that alone. text:
        the folder of the text encoder; None: where the run has it from. vae and text may be names on the Hugging Face
        Hub (emf.weights.hub.named). ar: who draws BLIP3o-NEXT's image tokens instead of its language model here:
        `vllm`, in this process, or a server of OpenAI's protocol by its address. scale: of BLIP3o-NEXT's image tokens,
        as condition.scale of the config; None: the run's. beside: a sampler of the same run,
        whose network, autoencoder and engine are taken where they are the same. Raises ValueError on what does not
        fit, and NotFinite on weights that hold NaN or inf."""
        place = find_device(device)
        run = Path(run)
        vae = named(vae, AUTOENCODER, "generate") if vae else None
        text = named(text, ENCODER, "generate") if text else None
        note, place_of = "", run
        engine = (None if ar is None else find_engine(ar, place)) if beside is None else beside.engine
        if flow_matching:
            own = None if beside is None else (beside.config, beside.network, Path(beside.source))
            found = load_velocity(run, text, own)
            config, network, place_of, note = found.config, found.network, found.source, found.note
        else:
            config, network, place_of = at_weights(run, lambda place: (*load(place, text), place))
            if config.objective == "flow_matching" and flow_matching is not None:
                raise ValueError(f"generate: {run} was trained for flow matching alone; say --flow-matching")
        small = {"text": text if config.condition.kind == "small" else None}
        refuse_idle("generate", small, f"{run} has the digits' own text encoder")
        pixels = {"vae": vae if config.transformer.in_channels == 3 else None}
        refuse_idle("generate", pixels, f"{run} draws pixels, without an autoencoder")
        idle = {"scale": scale if config.condition.kind != "blip3o" else None}
        refuse_idle("generate", idle, f"{run} is not conditioned on BLIP3o-NEXT's image tokens")
        pooled = beside.pooled if beside is not None and config is beside.config else None
        if scale is not None and scale != config.condition.scale:  # the run's own is no other way of drawing
            pooled = scale
            network.encoder.pool(scale)
            config = replace(config, condition=replace(config.condition, scale=scale))
        if engine is not None and beside is None:
            begin(engine, run, config, network)
        network = network.to(place, getattr(torch, dtype or ("float32" if place.type == "cpu" else "bfloat16")))
        folder, channels = vae or config.data.vae, config.transformer.in_channels
        if folder is None and channels != 3:
            raise ValueError(f"generate: {run} gives latents of {channels} channels; name their autoencoder with --vae")
        if folder is not None and not folder.is_dir():
            raise ValueError(f"generate: no folder {folder}, where the autoencoder should lie; name it with --vae")
        if beside is not None:
            autoencoder = beside.autoencoder
        else:
            autoencoder = None if folder is None else load_dcae(folder, device=place)
        source = place_of / WEIGHTS if (place_of / WEIGHTS).is_file() else place_of
        how = Settings(average=not flow_matching and config.objective != "flow_matching")
        sampler = cls(config, network, autoencoder, how, weights_stamp(place_of), source=source, engine=engine)
        sampler.note, sampler.pooled, sampler.step = note, pooled, step_of(place_of)
        if fault := sampler.fault():
            raise NotFinite([], fault)
        return sampler

    def fault(self) -> str:
        """Which weight holds NaN or inf, the first of them; empty where all are finite."""
        folder = self.config.condition.folder
        if name := bad_weight(self.network):
            own = name in self.network.own_encoder or not name.startswith("encoder.") or folder is None
            return f"{name} in {self.source if own else folder} holds NaN or inf"
        if name := bad_weight(getattr(self.autoencoder, "module", None)):
            return f"{name} of the autoencoder holds NaN or inf"
        return ""

    @property
    def stamps(self) -> dict[str, str | None]:
        """Digests of all that images depend on beside settings and captions: `weights`, see `stamp`, and those of the
        text encoder and of the autoencoder, which may lie elsewhere."""
        vae = getattr(self.autoencoder, "module", None)
        text = module_stamp(self.network.encoder)
        return {"weights": self.stamp, "text": text, "vae": None if vae is None else module_stamp(vae)}

    @property
    def told(self) -> dict[str, Any]:
        """What a picture's manifest says of its image tokens: the engine that drew them, where the encoder did not, and
        their scale, where it is not the run's."""
        told = {"image_tokens": self.engine and self.engine.said, "scale": self.pooled}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def guidance(self) -> float:
        """Where no settings say another: that of the network's world."""
        return default_guidance(self.config.condition.kind)

    @property
    def scale(self) -> int:
        """Pixels along a side to a latent."""
        return 1 if self.autoencoder is None else self.autoencoder.scale

    @property
    def device(self) -> torch.device:
        return next(self.network.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.transformer.parameters()).dtype

    def shape_of(self, size: Pixels | None) -> tuple[int, int, int]:
        """Of the latents of a picture of this size; see latent_shape. Raises ValueError on one that cannot be drawn."""
        return latent_shape(self.config.transformer, self.scale, size)

    def check_captions(self, captions: Sequence[str]) -> None:
        """Raises ValueError on a caption that the encoder cannot read; asked before the first of many is drawn."""
        for first in range(0, len(captions), 64):
            self.network.encoder.tokenize(captions[first : first + 64])

    def pictures(
        self,
        captions: Sequence[str],
        settings: Settings | None = None,
        *,
        numbers: Sequence[int] | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """Images of captions as 8-bit RGB; see `images`."""
        return [Image.fromarray(x) for x in to_uint8(self.images(captions, settings, numbers=numbers, **changes))]

    def images(
        self,
        captions: Sequence[str],
        settings: Settings | None = None,
        *,
        numbers: Sequence[int] | None = None,
        **changes: Any,
    ) -> Tensor:
        """Images of captions, [n, 3, H, W] float32 on the CPU, in about [-1, 1].

        settings: None takes the sampler's own. changes: single settings by name, as in images(captions, steps=4).
        numbers: of the images, which seed them together with settings.seed; None: 0, 1, ...
        Raises ValueError on settings out of their range, and on a caption that the encoder cannot read; NotFinite, with
        the numbers of the images, where one is not finite.
        """
        how = replace(settings or self.settings, **changes)
        if not captions:
            raise ValueError("sample: no captions; expected at least one")
        return torch.cat(list(self.draw(batches_of(captions, how, numbers), lambda _, images: images)))

    def draw(self, batches: Sequence[Batch], then: Callable[[Batch, Tensor], Result]) -> Iterator[Result]:
        """then(batch, images) of each batch and its images [n, 3, H, W] float32 on the CPU, one batch after the other;
        the same whether the stages overlap or not. It is called when the images are there, perhaps in another thread.
        Raises what `images` raises, after the batches before."""
        made = ((batch, self._conditions(batch)) for batch in batches)

        def work(one: tuple[Batch, tuple[States, States]], go_on: GoOn) -> Result:
            return then(one[0], self._images(one, go_on))

        if self.overlaps and len(batches) > 1:
            return work_aside(made, work, self.device)
        return (work(one, nothing) for one in made)

    def _conditions(self, batch: Batch) -> tuple[States, States]:
        """The text stage of a batch."""
        network, device = self.network, self.device
        with timed(self.seconds, "text", device):
            return conditions_of(network.encoder, batch.captions, batch.seeds, device, self.dtype, self.engine)

    def _images(self, made: tuple[Batch, tuple[States, States]], go_on: GoOn) -> Tensor:
        """The images of a batch and its conditions."""
        batch, conditions = made
        try:
            return check_finite(self._decode(self._latents(batch, conditions, go_on), go_on))
        except NotFinite as error:
            fault = self.fault() or "the weights are finite"
            raise NotFinite([batch.numbers[i] for i in error.places], fault) from None

    @torch.no_grad()
    def _latents(self, batch: Batch, conditions: tuple[States, States], go_on: GoOn) -> Tensor:
        """Latents [B, C, h, w] float32 of one batch, on the network's device."""
        network, device, how = self.network, self.device, batch.how
        guidance = self.guidance if how.guidance is None else how.guidance

        def transformer(*inputs: Any) -> Any:
            go_on()
            return network.transformer(*inputs)

        with timed(self.seconds, "transformer", device):
            return latents_of(
                transformer,
                noise_of(batch.seeds, self.shape_of(how.size)).to(device),
                *conditions,
                steps=how.steps,
                guidance=guidance / self.config.flow.built_in if how.average else guidance,
                average=how.average,
            )

    def _decode(self, latents: Tensor, go_on: GoOn) -> Tensor:
        """Latents to images on the CPU, one at a time for the sake of memory; as they are without an autoencoder."""
        if self.autoencoder is None:
            return latents.cpu()
        with timed(self.seconds, "decoder", self.device):
            done = []
            for z in latents:
                go_on()
                done.append(self.autoencoder.decode(z[None]).cpu())
            return torch.cat(done)


def weights_stamp(source: Path) -> str:
    """A digest of the weights in a folder, or in one file: of names, sizes, and both ends of each file."""
    folder = source if source.is_dir() else source.parent
    digest = hashlib.sha256()
    for file in [source] if source.is_file() else sorted(source.rglob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as opened:
            ends = opened.read(2**16)
            opened.seek(max(0, size - 2**16))
            ends += opened.read()
        digest.update(f"{file.relative_to(folder)} {size} ".encode() + ends)
    return digest.hexdigest()[:16]


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the time that a block takes on its device to seconds[name]."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":  # this thread's stream alone: another may go on
        torch.cuda.current_stream(device).synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """Images [n, C, H, W] in about [-1, 1] -> [n, H, W, C] uint8."""
    return ((np.asarray(images) + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
