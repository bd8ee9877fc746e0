"""What answers DPG-Bench's questions about an image: a network through transformers, or a file of recorded answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from emf.device import AUTO
from emf.device import device as find_device
from emf.evaluate.benchmark import stamp
from emf.evaluate.clip import normalized, pretrained
from emf.evaluate.network_names import BLIP
from emf.files import numbered_jsonl, place_or_name
from emf.weights.tensors import module_stamp

IMAGES = 4
"""Of each grid."""


class VQA(Protocol):
    """What answers the questions."""

    label: str
    settings: dict[str, Any]
    deviations: list[str]

    def answers(self, name: str, crop: int, image: Image.Image, questions: Mapping[int, str]) -> dict[int, str]:
        """The answer to each question about an image: number `crop` of the grid `name`."""


class RecordedVQA:
    """Answers from a jsonl file: {"filename", "crop" (0..3), "answers": {proposition id: answer}} a line."""

    label = "DPG-Bench (recorded answers)"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.said: dict[tuple[str, int], dict[int, str]] = {}
        for number, row in numbered_jsonl(file):
            try:
                crop, answers = (row["filename"], row["crop"]), row["answers"].items()
                self.said[crop] = {int(k): a for k, a in answers if a is not None}
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{file}:{number} lacks {error}; expected filename, crop and answers") from None
            if wrong := [a for a in self.said[crop].values() if not isinstance(a, str)]:
                raise ValueError(f'{file}:{number} has the answer {json.dumps(wrong[0])}; expected text, as in "yes"')
        self.settings = {"answers": stamp(file)}
        self.deviations = [f"answers were read from {file.name}, not made here; comparable if they are mPLUG's"]

    def check(self, asked: Mapping[str, Iterable[int]]) -> None:
        """Raises ValueError where the file lacks an answer; asked: propositions by name of the grid."""
        for name, questions in asked.items():
            for crop in range(IMAGES):
                self._said(name, crop, questions)

    def _said(self, name: str, crop: int, questions: Iterable[int]) -> dict[int, str]:
        said = self.said.get((name, crop), {})
        if missing := [q for q in questions if q not in said]:
            raise ValueError(f"{self.file} has no answer to proposition {missing[0]} of {name}, crop {crop}")
        return {q: said[q] for q in questions}

    def answers(self, name: str, crop: int, image: Image.Image, questions: Mapping[int, str]) -> dict[int, str]:
        """See VQA. Raises ValueError where the file lacks an answer."""
        return self._said(name, crop, questions)


@dataclass
class BlipVQA:
    """BLIP's visual question answering through transformers. Use BlipVQA.load()."""

    model: Any
    """BlipForQuestionAnswering."""
    tokenizer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    """Questions at once."""
    label: str = "DPG-Bench (BLIP-VQA; not comparable to mPLUG)"

    def __post_init__(self) -> None:
        self.deviations = [
            "answers are BLIP-VQA's instead of mPLUG's: not comparable with official or the paper's numbers"
        ]

    @classmethod
    def load(cls, model: str = BLIP, device: str = AUTO) -> BlipVQA:
        """From a folder or a Hub name. Raises ValueError, saying what to put where."""
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        place = find_device(device)
        network = pretrained(BlipForQuestionAnswering, model, "DPG-Bench's VQA network").to(place)
        told = {"vqa": place_or_name(model), "vqa weights": module_stamp(network)}
        return cls(network, pretrained(AutoTokenizer, model, "DPG-Bench's VQA network"), told)

    @torch.no_grad()
    def answers(self, name: str, crop: int, image: Image.Image, questions: Mapping[int, str]) -> dict[int, str]:
        """See VQA."""
        size = int(self.model.config.vision_config.image_size)
        pixels = normalized(image.resize((size, size), Image.Resampling.BICUBIC)).to(self.model.device)
        by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for q, text in questions.items():
            ids = self.tokenizer(text).input_ids
            by_length[len(ids)].append((q, ids))
        said: dict[int, str] = {}
        # never padded: BLIP's decoder attends to the question's padding, so a batch would change the answers
        for same in by_length.values():
            for i in range(0, len(same), self.batch):
                part = same[i : i + self.batch]
                tokens = self.model.generate(
                    input_ids=torch.tensor([ids for _, ids in part], device=self.model.device),
                    pixel_values=pixels.expand(len(part), -1, -1, -1),
                    do_sample=False,
                    max_new_tokens=10,
                )
                texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                said |= {q: text for (q, _), text in zip(part, texts, strict=True)}
        return {q: said[q].strip() for q in questions}
