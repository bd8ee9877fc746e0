"""EMF as a diffusers pipeline: few-step pictures from a folder that `emf export` wrote, by the sampler of `emf
generate`, as in `EMFPipeline.from_pretrained("out")("a red cube", num_inference_steps=2).images`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from emf.conditioning.encoder import Encoder
from emf.flow import seed_of
from emf.model.autoencoder import decode, load_dcae
from emf.model.layers import States
from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer
from emf.sample.sampler import check_finite, conditions_of, latents_of, noise_of, to_uint8
from emf.sample.sampling_settings import Settings, default_guidance, latent_shape
from emf.weights.carried.flow_map_pipeline import seed_in
from emf.weights.diffusers_folder import load_exported_transformer
from emf.weights.export import write_export
from emf.weights.folders import export_config, export_encoder, text_parts
from emf.weights.layouts import DUAL, dual_file
from emf.weights.lora import put_on, read_adapters

Generators = torch.Generator | list[torch.Generator] | None


class EMFTransformer(ModelMixin, ConfigMixin):
    """Our Transformer as a model of diffusers', so that a pipeline can hold, move and cast it."""

    config_name: Any = "config.json"

    @register_to_config
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.network = Transformer(TransformerConfig(**sizes))

    def forward(self, z: Tensor, t: Tensor, r: Tensor | None, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """See Transformer."""
        velocity: Tensor = self.network(z, t, r, c, mask)
        return velocity

    @classmethod
    def from_export(
        cls, folder: Path, dtype: torch.dtype = torch.float32, adapters: Path | None = None
    ) -> EMFTransformer:
        """The transformer folder that `emf export` wrote, with both time embedders, or one of diffusers' with adapters
        that bring them. Raises ValueError where it is another."""
        if adapters is None and not dual_file(folder).is_file():
            raise ValueError(
                f"pipeline: {folder} has no {DUAL}; expected the transformer of a folder from `emf export`"
            )
        network = load_exported_transformer(folder, dtype)
        if adapters is not None:
            put_on(network, read_adapters(adapters), adapters)
            if not network.config.dual_time:
                raise ValueError(f"pipeline: neither {folder} nor {adapters} has the two time embedders of EMF")
        with torch.device("meta"):
            model = cls(asdict(network.config))
        model.network = network
        return model.eval()


class EMFPipeline(DiffusionPipeline):
    """Images by EMF's sampler in 1, 2, 4, 8 steps. Without a vae, latents; without a text encoder, from prompt_embeds.

    It says diffusers' arguments in those of `emf generate`, and computes by the same functions (emf.sample.sampler): of
    the same weights, seed, prompts and settings both give the same pictures, bit for bit.
    text_encoder: an Encoder of emf.conditioning, which brings its tokenizer.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components: Any = ["scheduler", "vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.scale = 1 if vae is None else int(vae.spatial_compression_ratio)
        self.guidance, self.built_in = default_guidance(None), 1.0
        """Guidance where a call says none; how much of it the transformer was trained with."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> Any:
        """A folder from `emf export`. kwargs are DiffusionPipeline.from_pretrained's: transformer, vae and text_encoder
        in the place of the folder's (None: without), torch_dtype of transformer and text encoder. The autoencoder stays
        float32, as in `emf generate`.

        adapters: a folder from `emf export --adapters`, which is merged into the transformer; the base may then be SANA
        as it was published. Raises ValueError where the folder is another.
        """
        folder, adapters = Path(pretrained_model_name_or_path), kwargs.pop("adapters", None)
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"pipeline: torch_dtype {dtype!r}; expected one dtype for all parts")
        if (transformer := kwargs.get("transformer")) is None:
            transformer = EMFTransformer.from_export(folder / "transformer", dtype, adapters and Path(adapters))
        elif adapters is not None:
            raise ValueError("pipeline: adapters go with the folder's transformer; give no other, or load_lora_weights")
        if "vae" not in kwargs and (folder / "vae").is_dir():
            kwargs["vae"] = load_dcae(folder).module
        kind, encoder = text_parts(folder)["kind"], kwargs.pop("text_encoder", ...)
        config = export_config(folder, transformer.network.config) if kind else None
        if encoder is ...:
            encoder = None if config is None else export_encoder(folder, config).to(dtype).eval()
        elif not (encoder is None or isinstance(encoder, Encoder)):
            raise ValueError(
                f"pipeline: text_encoder is {type(encoder).__name__}; expected one of emf.conditioning.load, or None"
            )
        if kwargs.pop("tokenizer", None) is not None:
            raise ValueError("pipeline: a text encoder brings its own tokenizer; give none")
        kwargs |= {"transformer": transformer, "text_encoder": None, "tokenizer": None}
        pipe = super().from_pretrained(str(folder), **kwargs)
        pipe.register_modules(text_encoder=encoder, tokenizer=getattr(encoder, "tokenizer", None))
        pipe.guidance = default_guidance(kind)
        pipe.built_in = 1.0 if config is None else config.flow.built_in
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """model_index.json without the modules that an export carries for those who have not got emf: this class is in
        the place of one of them, and its transformer of another."""
        found = super().load_config(*args, **kwargs)
        index = found[0] if isinstance(found, tuple) else found
        if "settings" in index:
            for name in ("settings", "language_model", "connector"):
                index.pop(name, None)
            index |= {"_class_name": cls.__name__, "transformer": ["diffusers", "SanaTransformer2DModel"]}
        return found

    def load_lora_weights(self, folder: str | os.PathLike[Any]) -> None:
        """Merge adapters into the transformer, from a folder in peft's or diffusers' form, and put what was trained in
        full beside them in the place of its own. Raises ValueError, and leaves all as it was, where they belong to
        another transformer."""
        put_on(self.transformer.network, read_adapters(Path(folder)), Path(folder))

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *_: Any, **__: Any) -> None:
        """Export the transformer, the other parts as they lie in the folder that this was loaded from."""
        network, name = self.transformer.network, dict(self.config).get("_name_or_path")
        origin = Path(name) if name else None
        text = origin if origin is not None and (origin / "language_model").is_dir() else None
        how: Any = dict(base=origin, text=text, adapters=network.adapters)
        write_export(network.state_dict(), network.config, Path(save_directory), **how)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> Any:
        """Images of prompts, or of their states.

        prompt_embeds [B, M, caption channels], prompt_attention_mask [B, M]: what the transformer attends to.
        negative_prompt_embeds: the null condition's states, of the same shape or [1, ...]; None: the text encoder's
            own for prompts, zeros for prompt_embeds. BLIP3o-NEXT's null is its connector's output for zeros; give that
            one. Their mask, negative_prompt_attention_mask, is their own; None: all are attended to.
        num_inference_steps: equal steps of z_r = z_t - (t - r) u(z_t, r, t)
        guidance_scale: u_null + w (u - u_null); 1 evaluates once a step. None: that of `emf generate`.
        height, width: of the images, multiples of the autoencoder's factor; None: what the transformer was made for
        generator: its seed is that of `emf generate`, and gives the same pictures, wherever it lies; used again, it
            gives others. Of a list each is an image's. None: a random seed.
        latents: noise [B, C, H, W] instead of drawing it
        output_type: "pil", "np", "pt" or "latent". Raises ValueError on what does not fit, and NotFinite
            where an image holds NaN or inf.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pipeline: give either prompt or prompt_embeds")
        if prompt is not None and self.text_encoder is None:
            raise ValueError("pipeline: no text encoder reads prompts here; give prompt_embeds, or a text_encoder")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"pipeline: output_type {output_type!r}; expected pil, np, pt or latent")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        n = len(prompts) if prompt_embeds is None else len(prompt_embeds)  # type: ignore[arg-type]
        if not n:
            raise ValueError("pipeline: no prompts; expected at least one")
        guidance = self.guidance if guidance_scale is None else guidance_scale
        how = Settings(steps=num_inference_steps, guidance=guidance)
        shape = self._shape(height, width)
        if output_type != "latent" and self.vae is None and shape[0] != 3:
            raise ValueError('pipeline: no vae to decode with; give one, or output_type="latent"')
        if latents is not None and tuple(latents.shape) != (n, *shape):
            raise ValueError(f"pipeline: latents {tuple(latents.shape)}; expected {(n, *shape)}")
        seeds = seeds_of(generator, n)
        own = None if negative_prompt_embeds is None else (negative_prompt_embeds, negative_prompt_attention_mask)
        device, dtype, done = self._execution_device, self.transformer.dtype, []
        for part in (slice(i, i + how.batch) for i in range(0, n, how.batch)):
            condition, null = self._conditions(
                prompts and prompts[part], seeds[part], _part((prompt_embeds, prompt_attention_mask), part, n)
            )
            if own is not None:
                null = _part(own, part, n)
            noise = noise_of(seeds[part], shape) if latents is None else latents[part]
            images: Any = latents_of(
                self.transformer,
                noise.to(device),
                *(_placed(states, len(noise), device, dtype) for states in (condition, null)),
                steps=how.steps,
                guidance=guidance / self.built_in,
            )
            if output_type != "latent" and self.vae is not None:  # one at a time, as in `emf generate`
                images = check_finite(torch.cat([decode(self.vae, z[None]) for z in images]))
            done.append(images)
        self.maybe_free_model_hooks()
        images = _as(output_type, torch.cat(done))
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Of the latents of an image. Raises ValueError on pixels that make no whole number of patches."""
        model = self.transformer.network.config
        side = model.sample_size * self.scale
        return latent_shape(model, self.scale, (width or side, height or side), "pipeline")

    def _conditions(self, prompts: list[str] | None, seeds: list[int], given: Any) -> tuple[Any, Any]:
        """(condition, null) of a batch: the text encoder's, or what was given and zeros."""
        if prompts is None:
            return given, (torch.zeros_like(given[0]), None)
        return conditions_of(self.text_encoder, prompts, seeds, self._execution_device, self.transformer.dtype)


def _part(states: tuple[Tensor | None, Tensor | None], part: slice, n: int) -> Any:
    """States and mask of some of n images; what is given once holds for all."""
    return tuple(x if x is None or len(x) != n else x[part] for x in states)


def _placed(states: States, n: int, device: torch.device, dtype: torch.dtype) -> States:
    """States and mask of n images, of which there may be one for all, where the transformer is."""
    c, mask = states
    return c.to(device, dtype).expand(n, -1, -1), None if mask is None else mask.to(device, torch.bool).expand(n, -1)


def _as(output_type: str, images: Tensor) -> Any:
    """Images [n, 3, H, W] in about [-1, 1], in diffusers' form of that name; latents as they are."""
    if output_type == "latent":
        return images
    if output_type == "pil":
        return [Image.fromarray(x) for x in to_uint8(images.cpu())]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def seeds_of(generator: Generators, n: int) -> list[int]:
    """Seeds of n images, of their noise and of the image tokens that BLIP3o-NEXT draws before it: those that `emf
    generate` gives to its images 0, 1, ... by the generator's seed. Of a list of n each is for one image, its first."""
    if isinstance(generator, Sequence):
        if len(generator) != n:
            raise ValueError(f"pipeline: {len(generator)} generators; expected one, or one for each of {n} images")
        return [seed_of(seed_in(g), 0) for g in generator]
    seed = seed_in(generator)
    return [seed_of(seed, i) for i in range(n)]
