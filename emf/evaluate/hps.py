"""HPSv2.1 (arXiv 2306.09341; tgxs002/HPSv2): cosine of image and prompt under a CLIP fine-tuned on preferences, x 100.

Images: <root>/<style>/00000.jpg ...; prompts: <prompts>/<style>.json, a list of 800 texts. The checkpoint is
open_clip's ViT-H-14; its weights are renamed to transformers' CLIPModel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emf.device import AUTO
from emf.device import device as find_device
from emf.evaluate.benchmark import Result, Row, check_images, mean, score_images, stamps, write_results
from emf.evaluate.clip import MEAN, STD, Clip, pretrained
from emf.evaluate.network_names import CLIP
from emf.files import files_in, open_image, place_or_name, read_json, why
from emf.model.state import read_pickle
from emf.weights.tensors import module_stamp

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS, GROUP = 800, 80
"""Of a style; of a group, over whose means the standard deviation is taken."""
LABEL = "HPSv2.1 (transformers)"

_TOWERS = {
    "visual.": "vision_model.",
    "": "text_model.",
}
_NAMES = {  # open_clip -> transformers, what is not in a layer
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers' CLIPModel.

    in_proj [3 D, D] is split into q, k, v; the projections, x @ p there and Linear here, are transposed.
    Raises ValueError on a weight that open_clip's CLIP does not have.
    """
    converted: dict[str, Tensor] = {}
    for key, weight in state.items():
        key = key.removeprefix("module.")
        if key == "attn_mask":
            continue
        if key in _NAMES:
            converted[_NAMES[key]] = weight
        elif key in _PROJECTIONS:
            converted[_PROJECTIONS[key]] = weight.T.contiguous()
        else:
            converted |= _convert_layer(key, weight)
    return converted


def _convert_layer(key: str, weight: Tensor) -> dict[str, Tensor]:
    tower, _, rest = key.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    kind = part.rpartition(".")[2].rpartition("_")[2]  # weight or bias
    if tower in _TOWERS and number.isdigit():
        layer = f"{_TOWERS[tower]}encoder.layers.{number}."
        if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            return {f"{layer}self_attn.{n}_proj.{kind}": x for n, x in zip("qkv", weight.chunk(3), strict=True)}
        name = part.removesuffix(f".{kind}")
        if name in _LAYER:
            return {f"{layer}{_LAYER[name]}.{kind}": weight}
    raise ValueError(
        f"HPSv2.1: the checkpoint's {key} is no weight of open_clip's CLIP; expected HPS_v2.1_compressed.pt"
    )


def config_of(state: Mapping[str, Tensor], heads: tuple[int, int] = (16, 16)) -> Any:
    """The CLIPConfig of converted weights; heads: of the vision and the text tower, which no weight's shape tells."""
    from transformers import CLIPConfig

    patch = state["vision_model.embeddings.patch_embedding.weight"]
    grid = math.isqrt(len(state["vision_model.embeddings.position_embedding.weight"]) - 1)
    tokens = state["text_model.embeddings.token_embedding.weight"]

    def tower(prefix: str, n: int) -> dict[str, Any]:
        ffn = [v for k, v in state.items() if k.startswith(prefix) and k.endswith("mlp.fc1.weight")]
        size = {"hidden_size": ffn[0].shape[1], "intermediate_size": ffn[0].shape[0], "num_hidden_layers": len(ffn)}
        return size | {"num_attention_heads": n, "hidden_act": "gelu", "projection_dim": embed}

    embed = len(state["visual_projection.weight"])
    context = len(state["text_model.embeddings.position_embedding.weight"])
    # of the two token ids none is used: the end of text is found as the highest id (clip.py)
    text = tower("text_model.", heads[1]) | {"vocab_size": len(tokens), "max_position_embeddings": context}
    vision = tower("vision_model.", heads[0]) | {"patch_size": patch.shape[-1], "image_size": grid * patch.shape[-1]}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed)


def check_weights(checkpoint: Path) -> None:
    """Raises ValueError where the file of HPSv2.1's weights is missing."""
    if not checkpoint.is_file():
        raise ValueError(f"HPSv2.1: {checkpoint} does not exist; put HPS_v2.1_compressed.pt (xswu/HPSv2) there")


def load_clip(checkpoint: Path, tokenizer: str = CLIP, device: str = AUTO, heads: tuple[int, int] = (16, 16)) -> Clip:
    """HPSv2.1's network. checkpoint: HPS_v2.1_compressed.pt; tokenizer: a folder or Hub name of CLIP's.

    Raises ValueError, saying what to put where.
    """
    from transformers import AutoTokenizer, CLIPModel

    place = find_device(device)
    check_weights(checkpoint)
    try:
        state = convert(read_pickle(checkpoint)["state_dict"])
        model: Any = CLIPModel(config_of(state, heads))
        lacking, _ = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        lacking = [k for k in lacking if not k.endswith("position_ids")]
    except (KeyError, TypeError, IndexError, RuntimeError, AttributeError, ValueError) as error:
        said = f": {why(error)}" if isinstance(error, ValueError) else f" ({type(error).__name__})"
        raise ValueError(
            f"HPSv2.1: {checkpoint} cannot be read{said}; expected HPS_v2.1_compressed.pt, a dict with state_dict"
        ) from None
    if lacking:
        raise ValueError(f"HPSv2.1: {checkpoint} lacks {len(lacking)} weights, {lacking[0]} the first")
    return Clip(model.to(place), pretrained(AutoTokenizer, tokenizer, "HPSv2.1's tokenizer"))


def hps_pixels(image: Image.Image, size: int, antialias: bool = True) -> Tensor:
    """RGB image -> CLIP-normalised [3, size, size]: longer side to `size` (bicubic, of the float tensor), the rest 0.

    antialias: torchvision resizes tensors so since 0.17; before, as when HPSv2 appeared, it did not.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    h, w = pixels.shape[1:]
    scale = size / max(h, w)
    if scale != 1:
        new = round(h * scale), round(w * scale)
        pixels = F.interpolate(pixels[None], new, mode="bicubic", align_corners=False, antialias=antialias)[0]
        below, right = size - new[0], size - new[1]
        pixels = F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
    mean_, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (pixels - mean_) / std


def read_prompts(folder: Path, style: str) -> list[str]:
    """A style's prompts. Raises ValueError where they are missing or something else."""
    file = folder / f"{style}.json"
    try:
        texts = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; put HPDv2's benchmark/{style}.json there") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{file} is no list of texts; expected HPDv2's benchmark/{style}.json")
    return texts


def check_styles(root: Path, styles: Sequence[str] = STYLES) -> None:
    """Raises ValueError where a style has no image in its folder; asked before the prompts are looked for."""
    check_images(root)
    for style in styles:
        if not files_in(root / style, "*.jpg", "*.png"):
            raise ValueError(f"{root / style} holds no images; expected {style}/00000.jpg, {style}/00001.jpg, ...")


def read_images(root: Path, prompts: Path, styles: Sequence[str]) -> dict[str, tuple[str, str]]:
    """File name, relative to root -> (style, prompt), of every prompt. Raises ValueError on what is missing."""
    work: dict[str, tuple[str, str]] = {}
    for style in styles:
        texts = read_prompts(prompts, style)
        names = [f"{style}/{i:05d}" for i in range(len(texts))]
        kinds = [next((k for k in (".jpg", ".png") if (root / f"{n}{k}").is_file()), "") for n in names]
        if not all(kinds):
            first = names[kinds.index("")]
            raise ValueError(f"{root / first}.jpg is missing, and {kinds.count('') - 1} more of {style}; generate them")
        work |= {f"{n}{k}": (style, text) for n, k, text in zip(names, kinds, texts, strict=True)}
    return work


def summarize(scores: Mapping[str, float]) -> tuple[float, float]:
    """(mean, standard deviation) of the means of groups of 80, in order of the names; scores x 100 already."""
    ordered = [scores[n] for n in sorted(scores)]
    groups = [mean(ordered[i : i + GROUP]) for i in range(0, len(ordered), GROUP)]
    centre = mean(groups)
    return centre, math.sqrt(mean((g - centre) ** 2 for g in groups))


def settings_of(network: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
    """What scores depend on beside the images: whose weights they are, and how it is computed."""
    return {"benchmark": "HPSv2.1", **network, "half": how["half"], "antialias": how["antialias"], "cleaned": "ftfy"}


def score_hps(
    root: Path,
    out: Path,
    prompts: Path,
    clip: Clip,
    *,
    settings: dict[str, Any] | None = None,
    styles: Sequence[str] = STYLES,
    half: bool = False,
    antialias: bool = True,
    batch: int = 20,
    name: str = "",
    steps: int | None = None,
) -> Result:
    """Score a folder; scored.jsonl, results.json and results.md in `out`. A killed run goes on where it was.

    half: autocast to float16, as officially, on a GPU. name, steps: what the images are of.
    """
    work = read_images(root, prompts, styles)
    digests = stamps({n: (root / n, text) for n, (_, text) in work.items()})

    def score(names: Sequence[str]) -> list[Row]:
        pixels = torch.stack([hps_pixels(open_image(root / n), clip.size, antialias) for n in names])
        with torch.autocast(clip.model.device.type, torch.float16, enabled=half):
            similar = (clip.images(pixels) * clip.texts([work[n][1] for n in names])).sum(-1)
        return [
            {"style": work[n][0], "prompt": work[n][1], "score": 100 * s}
            for n, s in zip(names, similar.tolist(), strict=True)
        ]

    settings = settings_of(settings or {}, {"half": half, "antialias": antialias})
    rows = score_images(out, root, settings, digests, score, batch=batch)
    by_style = {s: summarize({r["filename"]: r["score"] for r in rows if r["style"] == s}) for s in styles}
    tables = {
        "style": {s: m for s, (m, _) in by_style.items()},
        f"style, standard deviation over groups of {GROUP}": {s: d for s, (_, d) in by_style.items()},
    }
    overall = mean(r["score"] for r in rows)
    deviations = _deviations(rows, styles, half, antialias)
    result = Result(
        benchmark="HPSv2.1",
        label=LABEL,
        name=name or root.name,
        steps=steps,
        overall=overall,
        tables=tables,
        images=len(rows),
        settings=settings,
        deviations=deviations,
    )
    write_results(out, result)
    return result


def _deviations(rows: Sequence[Row], styles: Sequence[str], half: bool, antialias: bool) -> list[str]:
    said = []
    if not half:
        said.append("float32 instead of autocast to float16")
    if antialias:
        said.append("antialiased resizing, torchvision's default since 0.17; HPSv2 appeared before it")
    if not all(r["filename"].endswith(".jpg") for r in rows):
        said.append("PNG files instead of JPEG")
    if set(styles) != set(STYLES):
        said.append(f"the average is over {', '.join(styles)} alone")
    counts = {s: sum(r["style"] == s for r in rows) for s in styles}
    said += [f"{n} prompts of {s} instead of {PROMPTS}" for s, n in counts.items() if n != PROMPTS]
    return said


@dataclass(frozen=True)
class HPS:
    """HPSv2.1 with its network, loaded once for however many folders are scored; a benchmark.Benchmark."""

    clip: Clip
    prompts: Path
    settings: dict[str, Any]
    how: dict[str, Any]
    """Of score_hps: styles, half, antialias."""
    label = LABEL

    @classmethod
    def load(cls, prompts: Path, checkpoint: Path, *, tokenizer: str = CLIP, device: str = AUTO, **how: Any) -> HPS:
        """prompts: the folder with <style>.json. checkpoint, tokenizer: see load_clip. how: of score_hps."""
        clip = load_clip(checkpoint, tokenizer, device)
        known = {"checkpoint": checkpoint.name, "tokenizer": place_or_name(tokenizer)}
        known |= {"weights": module_stamp(clip.model)}
        how = {"half": False, "antialias": True} | how
        return cls(clip, prompts, settings_of(known, how), how)

    @property
    def result_settings(self) -> dict[str, Any]:
        """See benchmark.Benchmark."""
        return self.settings

    def check(self, files: Sequence[str]) -> None:
        """See benchmark.Benchmark: what is drawn is of these prompts, all of them."""

    def score(self, images: Path, out: Path, *, name: str = "", steps: int | None = None) -> Result:
        """See score_hps."""
        return score_hps(
            images, out, self.prompts, self.clip, settings=self.settings, **self.how, name=name, steps=steps
        )


def run_hps(
    images: Path, out: Path, prompts: Path, checkpoint: Path, *, name: str = "", steps: int | None = None, **how: Any
) -> Result:
    """score_hps on what HPS.load makes of the rest; the images are looked at before."""
    check_images(images)
    check_weights(checkpoint)
    read_images(images, prompts, how.get("styles", STYLES))
    return HPS.load(prompts, checkpoint, **how).score(images, out, name=name, steps=steps)
