"""The paper's own figures (EMF, arXiv 2604.18168), which ours stand beside."""

from __future__ import annotations

BENCHMARKS: dict[str, tuple[tuple[str, int, float], ...]] = {
    "GenEval": (
        ("BLIP3o-NEXT", 30, 0.91),
        ("BLIP3o-NEXT", 4, 0.86),
        ("BLIP3o-NEXT", 1, 0.46),
        ("SANA-Sprint", 4, 0.77),
        ("rCM", 4, 0.83),
        ("EMF", 1, 0.74),
        ("EMF", 2, 0.85),
        ("EMF", 4, 0.90),
    ),
    "DPG-Bench": (
        ("BLIP3o-NEXT", 30, 82.05),
        ("BLIP3o-NEXT", 4, 78.15),
        ("BLIP3o-NEXT", 1, 57.05),
        ("EMF", 1, 77.36),
        ("EMF", 2, 79.44),
        ("EMF", 4, 81.20),
        ("EMF", 8, 81.94),
    ),
    "HPSv2.1": (
        ("BLIP3o-NEXT", 30, 29.42),
        ("BLIP3o-NEXT", 4, 26.96),
        ("BLIP3o-NEXT", 1, 18.54),
        ("EMF", 1, 25.77),
        ("EMF", 2, 27.21),
        ("EMF", 4, 29.25),
    ),
}
"""By benchmark: (model, steps, overall) in the paper's tables, where it has one."""

ENCODERS = {
    "discriminability": {"BLIP3o-NEXT": 0.734, "CLIP": 0.730, "Gemma": 0.713, "T5": 0.634},
    "disentanglement": {"BLIP3o-NEXT": 0.999, "CLIP": 0.967, "Gemma": 0.987, "T5": 0.893},
}
"""By analysis: the score of each text encoder, in the paper's comparison of text encoders."""

FEW_STEP, FLOW_MATCHING = "EMF", "BLIP3o-NEXT"
"""The paper's model, and the flow-matching model that it was trained from."""


def by_steps(benchmark: str, model: str) -> dict[int, float]:
    """A model's overall score on a benchmark by number of steps."""
    return {steps: score for name, steps, score in BENCHMARKS[benchmark] if name == model}
