"""DINO's global image features (DINOv2, arXiv 2304.07193; DINOv3, arXiv 2508.10104) through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emf.analyze.choices import DINO, ImagePooling
from emf.evaluate.clip import pretrained
from emf.weights.hub import NETWORK, named

TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


class Dino:
    """Images -> features. Use Dino.load().

    pooling: "cls": the class token after the last norm; "pooler": the model's pooler_output (of DINOv2 and DINOv3 ViTs
             the same); "mean": the mean over the patches, class and register tokens excluded.
    """

    def __init__(self, model: Any, processor: Any, pooling: ImagePooling = "cls") -> None:
        if pooling not in get_args(ImagePooling):
            raise ValueError(f"analyze: image pooling {pooling!r}; expected cls, pooler or mean")
        self.model, self.processor, self.pooling = model.eval(), processor, pooling
        self.skipped = 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)

    @classmethod
    def load(cls, where: str = DINO, pooling: ImagePooling = "cls", device: str = "cpu") -> Dino:
        """From a folder or a Hub name. Raises ValueError, saying what to put where."""
        from transformers import MODEL_MAPPING, AutoConfig

        def failed(error: Exception | str) -> ValueError:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return ValueError(
                f"analyze: {where} cannot be loaded as DINO ({reason}); put config.json, preprocessor_config.json and "
                "model.safetensors of a DINOv2 or DINOv3 into a folder and name that (DINOv3 on the Hub is gated)"
            )

        where = str(named(where, NETWORK, "analyze"))
        try:
            config = AutoConfig.from_pretrained(where)
        except Exception as error:  # a config with a value of another kind fails wherever that is used
            raise failed(error) from None
        if config.model_type not in TYPES:
            raise failed(f"its model_type is {config.model_type}")
        model = pretrained(MODEL_MAPPING[type(config)], where, "analyze's image encoder").to(device)
        try:
            processor = Dino3Pixels.load(where) if "dinov3" in config.model_type else _processor(where)
        except Exception as error:
            raise failed(error) from None
        return cls(model, processor, pooling)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> [n, D] float32 on the CPU, not normalised."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        out = self.model(pixel_values=pixels.to(self.model.device))
        if self.pooling == "pooler":
            return out.pooler_output.flatten(1).float().cpu()
        states = out.last_hidden_state
        return (states[:, 0] if self.pooling == "cls" else states[:, self.skipped :].mean(1)).float().cpu()


def _processor(where: str) -> Any:
    from transformers import AutoImageProcessor

    from emf.conditioning.load import quiet

    with quiet():  # on torchvision's absence; Pillow serves
        return AutoImageProcessor.from_pretrained(where)


class Dino3Pixels:
    """What DINOv3's image processor does, which needs torchvision: pixels / 255, resized to size x size whatever the
    aspect (bilinear, antialiased), less mean, over std; by preprocessor_config.json."""

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.size, self.mean, self.std = size, torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    @classmethod
    def load(cls, where: str) -> Dino3Pixels:
        from transformers import ImageProcessingMixin

        said, _ = ImageProcessingMixin.get_image_processor_dict(where)
        if said.get("do_center_crop"):
            raise ValueError("its preprocessor_config.json asks for a crop, which DINOv3's does not")
        size = said["size"]
        return cls((int(size["height"]), int(size["width"])), said["image_mean"], said["image_std"])

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        rows = []
        for image in images:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()[None] / 255
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)[0]
            rows.append((pixels - self.mean) / self.std)
        return {"pixel_values": torch.stack(rows)}
