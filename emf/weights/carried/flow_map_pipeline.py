"""Pictures of captions in 1, 2, 4 or 8 steps by EMF (arXiv 2604.18168), with diffusers and transformers alone:

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe("a red cube", num_inference_steps=2).images[0]

`emf export` puts this file beside the weights. What the text stage has to know stands in model_index.json, under
`settings`. With generator=torch.Generator().manual_seed(seed) the pictures are those of `emf generate --seed seed`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

States = tuple[Tensor, Any]
"""What the transformer attends to: states [B, M, C], and which of them, [B, M] bool; None is all."""
SEEDS, APART = 2**43, 1_000_003  # how many seeds there are, and how far apart those of two generators' pictures are
MOST_STEPS = 10_000
TOKENS_APART = 2**40  # is added to a picture's seed for its image tokens, which must not follow its noise


class EMFPipeline(DiffusionPipeline):
    """Captions, or their states, to pictures. A part that a folder lacks is None."""

    model_cpu_offload_seq: Any = "text_encoder->language_model->connector->transformer->vae"
    _optional_components: Any = ["vae", "text_encoder", "tokenizer", "language_model", "connector"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        *,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        language_model: Any,
        connector: Any,
        settings: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder)
        self.register_modules(tokenizer=tokenizer, language_model=language_model, connector=connector)
        self.register_to_config(settings=dict(settings or {}))
        self.told: dict[str, Any] = dict(settings or {})
        self.scale = 1 if vae is None else int(vae.spatial_compression_ratio)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of captions, or of the states that an encoder made of them.

        prompt_embeds [B, M, C] with prompt_attention_mask [B, M]: the states in the place of a prompt.
        negative_prompt_embeds: those without a caption, [B or 1, M, C]; by default zeros, all of them attended to.
        guidance_scale: u_null + w (u - u_null); by default what `emf generate` takes.
        height, width: in pixels. latents: the noise, [B, C, H, W]. output_type: "pil", "np", "pt" or "latent".
        """
        device, dtype, sizes = self._execution_device, self.transformer.dtype, self.transformer.config
        sizes = sizes.get("sizes", sizes)  # emf's transformer holds them in one
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pipeline: give either prompt or prompt_embeds")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"pipeline: output_type {output_type!r}; expected pil, np, pt or latent")
        if not 1 <= num_inference_steps <= MOST_STEPS:
            raise ValueError(f"pipeline: {num_inference_steps} steps; expected 1 to {MOST_STEPS}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts and (prompt_embeds is None or not len(prompt_embeds)):
            raise ValueError("pipeline: no prompts; expected at least one")
        seeds = seeds_of(generator, len(prompts) if prompt_embeds is None else len(prompt_embeds))
        if prompt_embeds is None:
            (c, mask), (null, null_mask) = self.encode_prompt(prompts, seeds)
        else:
            c, mask, null_mask = prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask
            null = torch.zeros_like(c)
            null = null if negative_prompt_embeds is None else null + negative_prompt_embeds.to(c)
        kept = [None if x is None else x.to(device, torch.bool).expand(len(c), -1) for x in (mask, null_mask)]
        conditions = list(zip((c.to(device, dtype), null.to(device, dtype)), kept, strict=True))

        unit = self.scale * sizes["patch_size"]
        sides = [side or sizes["sample_size"] * self.scale for side in (height, width)]
        if any(side % unit for side in sides):
            raise ValueError(f"pipeline: size {sides[1]}x{sides[0]} (width x height); expected multiples of {unit}")
        if output_type != "latent" and self.vae is None and sizes["in_channels"] != 3:
            raise ValueError('pipeline: no vae to decode with; give one, or output_type="latent"')
        shape = (sizes["in_channels"], *(side // self.scale for side in sides))
        if latents is None:
            latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in seeds])
        elif tuple(latents.shape) != (len(c), *shape):
            raise ValueError(f"pipeline: latents {tuple(latents.shape)}; expected {(len(c), *shape)}")

        z: Any = latents.to(device, torch.float32)
        if guidance_scale is None:
            guidance_scale = 1.25 if self.told.get("kind") == "small" else 2.0
        w = guidance_scale / self.told.get("built_in", 1.0)  # less what was trained into the network
        self.scheduler.set_timesteps(num_inference_steps)
        for i, step in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t, r = (s.float().to(device).repeat(len(z)) for s in self.scheduler.sigmas[i : i + 2])
            u, *others = (self.transformer(z.to(dtype), t, r, *x).float() for x in conditions[: 1 if w == 1 else 2])
            for u_null in others:
                u = u_null + w * (u - u_null)
            z = self.scheduler.step(u, step, z, return_dict=False)[0]

        if output_type != "latent":
            if self.vae is not None:
                z = self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
            if not z.isfinite().all():
                raise ValueError("pipeline: a picture holds NaN or inf")
            z = self.image_processor.postprocess(z.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(z) if return_dict else (z,)

    def encode_prompt(self, prompts: list[str], seeds: list[int]) -> tuple[States, States]:
        """What the transformer attends to, of captions and without them. seeds: of the pictures, and so of the image
        tokens that a language model draws for them."""
        kind = self.told.get("kind")
        if kind == "blip3o" and self.language_model is not None and self.tokenizer is not None:
            apart = [TOKENS_APART + n for n in seeds]
            states = self.connector.read(self.language_model, self.tokenizer, prompts, apart, told=self.told)
            return (self.connector(states), None), (self.connector(torch.zeros_like(states)), None)
        if kind == "small":
            known, length, read_as = (self.told[k] for k in ("vocabulary", "length", "read_as"))
            rows = [p.lower().split() for p in prompts]
            if not all(0 < len(row) <= length and set(row) <= set(known[1:]) for row in rows):
                raise ValueError(f"pipeline: expected captions of 1 to {length} of the words {' '.join(known[1:])}")
            found = [[read_as[known.index(word)] for word in row] + [0] * (length - len(row)) for row in rows]
            ids = torch.tensor(found, device=self._execution_device)
            c, null = self.text_encoder(ids, ids > 0)
            return (c, ids > 0), (null, torch.ones_like(ids))
        if kind in ("gemma", "clip", "t5") and self.text_encoder is not None:
            before = self.told["instruction"]
            # 2: the token that begins every text, counted in both, and one that is left for the caption's own end
            row = self.told["length"] + (len(self.tokenizer.encode(before)) - 2 if before else 0)
            clean = [p.lower().strip() if self.told["lower"] else p for p in prompts]
            return self._encoded([before + p for p in clean], row), self._encoded([""] * len(prompts), row)
        raise ValueError("pipeline: this folder has no text encoder; give prompt_embeds")

    def _encoded(self, texts: list[str], row: int) -> States:
        """A text model's last states: the first of a row, and the last length - 1 (SANA, arXiv 2410.10629)."""
        how: dict[str, Any] = dict(padding="max_length", max_length=row, truncation=True, padding_side="right")
        found = self.tokenizer(texts, return_attention_mask=True, return_tensors="pt", **how).to(self._execution_device)
        ids, mask = found["input_ids"], found["attention_mask"]
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        last = max(1, row - self.told["length"] + 1)
        return torch.cat([states[:, :1], states[:, last:]], 1), torch.cat([mask[:, :1], mask[:, last:]], 1)

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """Refused: diffusers would leave out this file and split the weights otherwise."""
        raise ValueError("pipeline: copy the folder that this was loaded from, or write one with `emf export`")


def seeds_of(generator: torch.Generator | list[torch.Generator] | None, n: int) -> list[int]:
    """Seeds of n pictures: those of `emf generate` by the generator's; of a list of generators each gives one."""
    if isinstance(generator, list):
        return [seed_in(g) * APART for g in generator]
    first = seed_in(generator) * APART
    return [first + i for i in range(n)]


def seed_in(generator: torch.Generator | None) -> int:
    """The seed that a generator was given; a further one where it has been used already, a random one of none."""
    if generator is None:
        return int(torch.randint(SEEDS, ()))
    unused = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    fresh = torch.equal(generator.get_state(), unused.get_state())
    further = int(torch.randint(SEEDS, (), generator=generator, device=generator.device))
    return generator.initial_seed() % SEEDS if fresh else further
