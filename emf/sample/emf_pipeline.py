"""EMF as a diffusers pipeline: few-step sampling with u(z_t, r, t) from a folder that `emf export` wrote, as in
`EMFPipeline.from_pretrained("out")(prompt_embeds=states, num_inference_steps=2, guidance_scale=1.5).images`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from emf.model.autoencoder import decode
from emf.model.sizes import TransformerConfig
from emf.model.state import variant
from emf.model.transformer import Transformer
from emf.sample.sampler import check_finite, latents_of
from emf.sample.sampling_settings import GUIDANCE_PIPELINE
from emf.weights.diffusers_folder import load_exported_transformer
from emf.weights.export import PARTS, write_export
from emf.weights.layouts import DUAL, dual_file
from emf.weights.lora import put_on, read_adapters

Conditioning = Callable[[list[str]], tuple[Tensor, Tensor, Tensor | None]]
"""Prompts -> (states [B, M, caption channels], the null condition's states of that shape, mask [B, M] or None)."""


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
    """Images by EMF's sampler in 1, 2, 4, 8 steps. Without a vae, latents; without conditioning, from prompt_embeds.

    It maps diffusers' arguments on the sampler of emf.sample.sampler, and takes conditions and noise from its caller.
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
        conditioning: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.conditioning: Conditioning | None = conditioning
        self.scale = 1 if vae is None else int(vae.spatial_compression_ratio)
        self.processor = VaeImageProcessor(vae_scale_factor=self.scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> Any:
        """A folder from `emf export`; kwargs are DiffusionPipeline.from_pretrained's (torch_dtype, vae=None, ...),
        conditioning (see Conditioning), and adapters: a folder from `emf export --adapters`, which is merged into
        the transformer; the base may then be SANA as it was published. Raises ValueError where it is another."""
        folder, adapters = Path(pretrained_model_name_or_path), kwargs.pop("adapters", None)
        kwargs.setdefault("transformer", None)
        if kwargs["transformer"] is None:
            dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"pipeline: torch_dtype {dtype!r}; expected one dtype for all parts")
            kwargs["transformer"] = EMFTransformer.from_export(
                folder / "transformer", dtype, adapters and Path(adapters)
            )
        elif adapters is not None:
            raise ValueError("pipeline: adapters go with the folder's transformer; give no other, or load_lora_weights")
        if "variant" not in kwargs:  # of parts that were published as one alone; diffusers knows which parts those are
            found = (variant(folder / part) for part in PARTS if kwargs.get(part, part) is not None)
            kwargs["variant"] = next((name for name in found if name), None)
        return super().from_pretrained(str(folder), **kwargs)

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
        guidance_scale: float = GUIDANCE_PIPELINE,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images for prompts (with a conditioning) or for their states.

        prompt_embeds [B, M, caption channels], prompt_attention_mask [B, M]: what the transformer attends to.
        negative_prompt_embeds: the null condition's states, of the same shape or [1, ...]; None: zeros. BLIP3o-NEXT's
                                null is its connector's output for zeros; give that one.
        num_inference_steps: equal steps of z_r = z_t - (t - r) u(z_t, r, t)
        guidance_scale: u_null + w (u - u_null); 1 evaluates once a step. EMF's released code samples with 1.5 and 2.
        height, width: of the images, multiples of the autoencoder's factor; None: what the transformer was made for
        latents: noise [B, C, H, W] instead of drawing it by `generator`
        output_type: "pil", "np", "pt" or "latent". Raises ValueError on what does not fit, and NotFinite
            where an image holds NaN or inf.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pipeline: give either prompt or prompt_embeds")
        if prompt is not None:
            if self.conditioning is None:
                raise ValueError(
                    "pipeline: no conditioning reads prompts here; give prompt_embeds, or conditioning=..."
                )
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, null, prompt_attention_mask = self.conditioning(prompts)
            negative_prompt_embeds = null if negative_prompt_embeds is None else negative_prompt_embeds
        assert prompt_embeds is not None
        model, device, dtype = self.transformer.network.config, self._execution_device, self.transformer.dtype
        side = model.sample_size * self.scale
        shape = (len(prompt_embeds), model.in_channels, (height or side) // self.scale, (width or side) // self.scale)
        if any(n % (self.scale * model.patch_size) for n in (height or side, width or side)):
            raise ValueError(
                f"pipeline: {height or side} x {width or side} pixels; expected multiples of "
                f"{self.scale * model.patch_size}"
            )
        if output_type != "latent" and self.vae is None:
            raise ValueError('pipeline: no vae to decode with; give one, or output_type="latent"')
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"pipeline: latents {tuple(latents.shape)}; expected {shape}")
        c = prompt_embeds.to(device, dtype)
        zeros = torch.zeros_like(c)
        null = zeros if negative_prompt_embeds is None else zeros + negative_prompt_embeds.to(device, dtype)
        mask = None if prompt_attention_mask is None else prompt_attention_mask.to(device, torch.bool)
        images: Any = latents_of(
            self.transformer,
            latents.to(device),
            (c, mask),
            (null, mask),
            steps=num_inference_steps,
            guidance=guidance_scale,
        )
        if output_type != "latent":
            images = self.processor.postprocess(check_finite(decode(self.vae, images)), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)
