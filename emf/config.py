"""Every setting of a run, as frozen dataclasses. A recipe (recipes.py) fills them; the command line overrides single
fields; config.json keeps them.

A config file is read by turning it back into command-line arguments, so the one parser checks names and types for both.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from emf.data.batches import Batches, DataConfig
from emf.data.buckets import PARTS
from emf.data.world import World
from emf.files import read_object
from emf.flow_config import FlowConfig, MatchConfig
from emf.limits import Within, check_limits
from emf.model.sizes import LARGEST_SIZE, EncoderConfig, TransformerConfig

MOST_STEPS = 9_999_999
"""As many as a checkpoint's name has digits for."""
Counted = Annotated[int, Within(1, MOST_STEPS)]
SAMPLES_A_STEP = 2**20
Decay = Annotated[float, Within(0, below=1)]
"""Of an average."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up."""

    lr: Annotated[float, Within(above=0)] = 1e-4
    """Learning rate after warm-up."""
    condition_lr: Annotated[float, Within(0, 1e6)] = 1.0
    """Factor on the learning rate of the condition's path: text encoder and caption projection."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: to zero along a cosine, or constant."""
    warmup: Annotated[float, Within(0)] = 0.05
    """How long the learning rate takes to grow from 0 to its full value: below 1 a share of the run's steps, else a
    number of steps."""
    betas: Annotated[tuple[float, float], Within(0, below=1)] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: Annotated[float, Within(0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Within(0)] = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema: Decay = 0.999
    """Decay of the exponential moving average of the weights; early steps use (1 + step) / (10 + step) where that is
    smaller. 0: no average is kept, and what is saved and sampled are the weights themselves."""
    ema_cpu: bool = False
    """Keep the moving average in the host's memory."""

    def __post_init__(self) -> None:
        check_limits(self, "config: optim.")
        if self.warmup >= 1 and self.warmup % 1:
            raise ValueError(
                f"config: optim.warmup {self.warmup} must be a share of the steps, below 1, or a whole number of them"
            )


@dataclass(frozen=True)
class ZeroConfig:
    """What becomes the DeepSpeed config."""

    stage: Literal[0, 1, 2, 3] = 0
    """What the ranks share. 0: nothing; 1: optimizer states; 2: gradients too; 3: weights too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format that the network computes in; with bfloat16 float32 master weights are kept."""
    accumulation: Annotated[int, Within(1, SAMPLES_A_STEP)] = 1
    """How many micro-batches an optimizer step is made of."""
    offload: bool = False
    """Keep the optimizer's states and float32 weights in the host's memory, and step there."""
    json: Path | None = None
    """A DeepSpeed JSON merged over the derived config."""

    def __post_init__(self) -> None:
        check_limits(self, "config: zero.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the transformer (peft's settings and names), trained in the place of its blocks' weights.
    The two time embedders and the tables (scale_shift_table) are trained in full beside them: without embedders that
    move no base becomes a flow map."""

    rank: Annotated[int, Within(0, LARGEST_SIZE)] = 0
    """Rank of each adapter; 0: no adapters, the weights themselves are trained."""
    alpha: Annotated[int, Within(1, LARGEST_SIZE)] = 16
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the linear layers that get an adapter."""

    @property
    def scale(self) -> float:
        """What the adapters' products are multiplied by; 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0

    def __post_init__(self) -> None:
        check_limits(self, "config: lora.")
        if self.rank and not self.targets:
            raise ValueError("config: lora.targets names no layer; expected ends of names, as to_q")


Scale = Literal[1, 2, 3]


@dataclass(frozen=True)
class ConditionConfig:
    """A pretrained text encoder from a folder on disk; frozen, unless `trained` names weights of it."""

    kind: Literal["small", "blip3o", "gemma", "clip", "t5", "text"] = "small"
    """Text encoder. small: that of the digits, trained here (see the encoder section); the others are pretrained."""
    folder: Path | None = None
    """blip3o: a folder from emf convert or emf export; for the others an encoder's or a diffusers pipeline's; or the
    OWNER/NAME of one on the Hugging Face Hub. By default that of `init`, where it has one."""
    scale: Scale = 1
    """BLIP3o-NEXT: image tokens pooled s x s into one; 729, 169 or 81 of them."""
    window: Literal["inference", "released"] = "inference"
    """BLIP3o-NEXT: the 730 positions that condition the transformer are those of inference, or the last 730 of the
    padded sequence, as the released training code takes them."""
    ar_weight: Annotated[float, Within(0)] = 0.0
    """BLIP3o-NEXT: weight of the language model's own loss, next-token cross entropy, beside the transformer's."""

    def __post_init__(self) -> None:
        check_limits(self, "config: condition.")
        if self.ar_weight and self.kind != "blip3o":
            raise ValueError(
                f"config: condition.ar_weight {self.ar_weight} needs condition.kind blip3o; the others have no loss of "
                "their own"
            )


@dataclass(frozen=True)
class RunConfig:
    """What is written and when; nothing here changes the weights that come out."""

    log_every: Counted = 10
    """Write a line of metrics.jsonl every so many steps."""
    save_every: Counted = 100
    """Save a checkpoint every so many steps."""
    eval_every: Annotated[int, Within(0, MOST_STEPS)] = 0
    """Sample and score during training every so many steps; 0: never."""
    eval_prompts: Annotated[int, Within(1, 10_000)] = 10
    """With eval_every: how many prompts of each of the six tasks are scored."""
    keep: Counted = 2
    """How many checkpoints are kept; older ones are removed."""
    skip: Annotated[int, Within(0, MOST_STEPS)] = 0
    """How many steps with a NaN or inf loss are skipped before the run stops."""
    prompts: tuple[str, ...] = ()
    """With eval_every: captions of a grid of samples, by the moving average and by the raw weights, at 1, 2 and 4
    steps; what ends in .txt is a file of captions, one a line."""
    monitor: tuple[Literal["tensorboard", "wandb", "csv"], ...] = ()
    """Where metrics, scores and pictures go beside metrics.jsonl: tensorboard and wandb, whose packages it then needs;
    csv takes no pictures."""

    def __post_init__(self) -> None:
        check_limits(self, "config: run.")
        if self.prompts and not self.eval_every:
            raise ValueError("config: run.prompts needs run.eval_every, the steps between two grids of samples")
        for prompt in self.prompts:
            if prompt.startswith("-"):  # config.json is read by the command line's own rules
                raise ValueError(f"config: run.prompts {prompt!r} begins with a dash, as a setting does; leave it out")


@dataclass(frozen=True)
class Config:
    recipe: str
    objective: Literal["flow_matching", "meanflow"] = "meanflow"
    init: Path | None = None
    """Weights to start from: a folder from emf convert or emf export, a run, one of its checkpoints, a file of weights,
    the name of weights in emf/assets, or OWNER/NAME of a folder on the Hugging Face Hub; none: random."""
    embedder_init: Literal["duplicate", "preserve"] = "duplicate"
    """MeanFlow's two time embedders from the pretrained one: `duplicate` copies it into both (the paper); `preserve`
    keeps the pretrained function at r = t: the end-time branch is fitted to it at the new time scale, the interval
    branch starts at zero."""
    freeze_encoder: bool = False
    """Do not train the text encoder."""
    trained: tuple[str, ...] = ()
    """Beginnings of the names of the weights that are trained; none: all that the objective trains. With lora.rank they
    name what is trained in full beside the adapters, of a block its table alone; none: embedders and tables."""
    seed: Annotated[int, Within(0, below=2**31)] = 0
    """Seed of everything random in a run: new weights, data, noise, times and dropped conditions."""
    steps: Counted = 1000
    """How many optimizer steps the run takes."""
    epochs: Annotated[float | None, Within(above=0)] = None
    """Length in another way, in the place of steps: how often as many samples are seen as data.sources hold."""
    batch_size: Annotated[int, Within(1, SAMPLES_A_STEP)] = 64
    """How many samples an optimizer step sees, over all ranks and micro-batches."""
    drop: Annotated[float, Within(0, below=1)] = 0.1
    """Probability of dropping a sample's condition."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile) for training, which costs minutes at its start; not with ZeRO 3.
    At most five numbers of samples carry a tangent then: those with r < t rounded up to quarters of a micro-batch."""
    graphs: bool = False
    """Replay the transformer's blocks as CUDA graphs in training, at micro-batches of 1 or 2; not with ZeRO 3,
    compile, or checkpointing."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    world: World = field(default_factory=World)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """What concerns the run, or several sections; each section has checked itself."""
        check_limits(self, "config: ")
        if self.epochs is not None and not self.data.sources:
            raise ValueError("config: epochs needs data.sources, whose size is known; say steps for the digits")
        if self.epochs is None and self.warmup > self.steps:
            raise ValueError(
                f"config: optim.warmup {self.warmup} is longer than the run of {self.steps} steps; give a share of the "
                "steps, as 0.03"
            )
        if self.batch_size % self.zero.accumulation:
            raise ValueError(
                f"config: batch_size {self.batch_size} is no multiple of zero.accumulation {self.zero.accumulation}"
            )
        sizes = self.transformer
        if sizes.out_channels != sizes.in_channels:
            raise ValueError(
                f"config: transformer.out_channels {sizes.out_channels} is not transformer.in_channels "
                f"{sizes.in_channels}; make them equal"
            )
        if self.objective == "meanflow" and not self.transformer.dual_time:
            raise ValueError("config: objective meanflow needs transformer.dual_time True")
        if self.match.weight and self.init is None:
            raise ValueError("config: match.weight needs --init, the flow-matching weights that it holds as they are")
        if self.match.weight and self.graphs:
            raise ValueError("config: match.weight has micro-batches of several sizes, which graphs cannot replay")
        if self.data.buckets and self.data.sources:
            self._check_buckets()
        if self.run.prompts and self.transformer.in_channels != 3 and self.data.vae is None:
            raise ValueError("config: run.prompts needs data.vae, which makes images of the latents")
        if self.condition.kind == "small":
            self._check_digits()

    def _check_buckets(self) -> None:
        unit = PARTS * self.transformer.patch_size
        if self.transformer.sample_size % unit:
            raise ValueError(
                f"config: data.buckets needs a transformer.sample_size that is a multiple of {unit}, not "
                f"{self.transformer.sample_size}"
            )
        for name in ("compile", "graphs"):
            if getattr(self, name):
                raise ValueError(
                    f"config: {name} True makes its code for one size of picture, and data.buckets has many; choose one"
                )

    def _check_digits(self) -> None:
        """The small world's own sections."""
        if self.data.sources:
            raise ValueError("config: the small encoder knows the digits' words alone; choose a --condition.kind")
        if self.transformer.in_channels != 3:
            raise ValueError(
                f"config: transformer.in_channels {self.transformer.in_channels} is not 3, which the digits' pictures "
                "have"
            )
        if self.world.size != self.transformer.sample_size:
            raise ValueError(
                f"config: world.size {self.world.size} is not transformer.sample_size {self.transformer.sample_size}; "
                "make them equal"
            )
        if self.encoder.out_channels != self.transformer.caption_channels:
            raise ValueError(
                f"config: encoder.out_channels {self.encoder.out_channels} is not transformer.caption_channels "
                f"{self.transformer.caption_channels}; make them equal"
            )

    def check_given(self) -> None:
        """Raises ValueError, one line for all of it, where a run of a pretrained text encoder was not told what no
        recipe can know: its weights, its encoder, its images."""
        kind, start = self.condition.kind, self.objective == "meanflow"
        if kind == "small":
            return
        needed = ""
        if self.transformer.in_channels != 3:  # else the flow works on the images themselves
            needed = ", which need --data.vae" + (" and --data.ta-tok too" if kind == "blip3o" else " too")
        needs = {
            "--init (the weights to adapt: a folder from emf convert)": start and self.init is None,
            f"--condition.folder (the {kind} encoder)": self.condition.folder is None
            and (kind != "blip3o" or (self.init is None and not start)),
            f"--data.sources (a folder from emf cache; or tars or folders of images with captions{needed})": not (
                self.data.sources
            ),
        }
        if lacks := [name for name, is_missing in needs.items() if is_missing]:
            raise ValueError(f"config: {self.recipe} needs {', and '.join(lacks)}")

    @property
    def warmup(self) -> int:
        """Steps of optim.warmup."""
        share = self.optim.warmup
        return int(share * self.steps) if share < 1 else int(share)

    @property
    def text_folder(self) -> Path | None:
        """Where the pretrained text encoder lies: BLIP3o-NEXT's in what the run starts from, where nothing else is
        said. None where nothing tells, and of the digits' own encoder."""
        kind = self.condition.kind
        return None if kind == "small" else self.condition.folder or (self.init if kind == "blip3o" else None)

    @property
    def batches(self) -> Batches:
        """What the feed of a run is asked for."""
        side = self.transformer.sample_size
        latent = self.transformer.in_channels, side, side
        scale = self.condition.scale if self.condition.kind == "blip3o" else None
        return Batches(self.seed, self.batch_size, latent, self.data, self.world, scale)


def to_json(config: Config) -> str:
    """The resolved config, one field a line."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A config file as a tree. Raises ValueError where it is missing or no JSON object."""
    if not path.exists():
        raise ValueError(f"config: no file {path}")
    return read_object(path, "config")
