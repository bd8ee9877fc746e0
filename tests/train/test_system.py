"""The whole way at a small size: a BLIP3o-NEXT folder in, images and captions, training, generation, an export out."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from same_pictures import assert_same_pictures

pytest.importorskip("deepspeed")
pytest.importorskip("diffusers")
import sana
from image_files import encoded, noise, pairs, small_autoencoder, write_folder, write_tar
from tiny import byte_tokenizer, ta_tok_file
from training import files, kill_in_save, metrics, train

from emf.cli.data import cache
from emf.cli.generate import generate
from emf.cli.weights import export
from emf.conditioning.blip3o import Blip3oNext
from emf.conditioning.sampling import Sampling
from emf.weights.convert import convert
from emf.weights.folders import load, load_run

SMALL = [word for k, v in sana.OURS.items() for word in (f"--transformer.{k.replace('_', '-')}", str(v))]
SMALL += ["--steps", "4", "--batch-size", "4", "--data.size", "32", "--optim.warmup", "1", "--optim.lr", "1e-3"]
SMALL += ["--zero.accumulation", "1", "--zero.stage", "0", "--zero.dtype", "float32"]
SMALL += ["--run.log-every", "1", "--run.save-every", "2"]
CAPTIONS = ("a red cat", "two dogs")


class World:
    """Files as a user has them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        special = ["<pad>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"]
        special += [f"<I{i}>" for i in range(50)]
        tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<|im_end|>")
        model = sana.diffusers_model()
        sana.blip3o(folder / "blip3o", model, tied=True, extras=True, tokenizer=tokenizer)
        model.save_pretrained(folder / "sana")
        convert(folder / "blip3o", self.base, config=folder / "sana" / "config.json")
        small_autoencoder().save_pretrained(folder / "pipeline" / "vae")
        index = {"_class_name": "SanaPipeline", "vae": ["diffusers", "AutoencoderDC"]}
        (folder / "pipeline" / "model_index.json").write_text(json.dumps(index))
        ta_tok_file(folder / "ta_tok.pth", size=54, patch=2)
        write_tar(folder / "data.tar", pairs(6))
        self.vae = folder / "pipeline"
        self.recipe = ["sana-1.5-1.6b", "--init", str(self.base), "--condition.scale", "3", *SMALL]
        self.recipe += ["--data.vae", str(self.vae)]
        self.images = ["--data.sources", str(folder / "data.tar"), "--data.ta-tok", str(folder / "ta_tok.pth")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run on images, encoded as it goes."""
    out = world.folder / "run"
    result = train(world.folder, *world.recipe, *world.images, "--out", str(out))
    assert result.code == 0, result.text
    return out


def test_a_checkpoint_holds_what_its_folder_does_not(run: Path, world: World) -> None:
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    weights = load_file(run / "checkpoints/step_0000004/model.safetensors")
    start = load_file(world.base / "transformer.safetensors")
    assert weights.keys() == {f"transformer.{k}" for k in start}
    trains = ("transformer_blocks.", "time_embed_t.", "time_embed_r.", "scale_shift_table")
    for name, value in start.items():
        # the norms of keys and queries do not move where their gradient is below the optimizer's epsilon
        same = torch.equal(weights[f"transformer.{name}"], value)
        assert same != name.startswith(trains), name
    engine = torch.load(run / "checkpoints/step_0000004/engine/mp_rank_00_model_states.pt", weights_only=False)
    assert all(k.startswith(tuple(f"transformer.{t}" for t in trains)) for k in engine["module"])


def test_a_cache_trains_as_its_images(run: Path, world: World, tmp_path: Path) -> None:
    """As far as sums go: a cache encodes its images in batches of another size, which round otherwise on some CPUs."""
    archive, tokens = str(world.folder / "data.tar"), world.folder / "ta_tok.pth"
    cache((archive,), world.vae, tmp_path / "cache", tokens, 3, 32, dtype="float32")
    cached = [*world.recipe, "--data.sources", str(tmp_path / "cache")]
    result = train(tmp_path, *cached, "--out", str(tmp_path / "one"))
    assert result.code == 0, result.text
    for got, want in zip(metrics(tmp_path / "one"), metrics(run), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    for stage in ("2", "3"):
        two = tmp_path / f"two{stage}"
        result = train(tmp_path, *cached, "--out", str(two), "--zero.stage", stage, ranks=2)
        assert result.code == 0, result.text
        got, want = ([row["error"] for row in metrics(r)] for r in (two, run))
        assert got == pytest.approx(want, rel=1e-4)


def test_a_killed_run_continues_where_the_data_was(run: Path, world: World, tmp_path: Path) -> None:
    """In a row group too, and rows of a Parquet file, which all are mixed here, train as the tar of the same."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from parquet_files import write_parquet

    again, source = tmp_path / "again", world.folder / "data.parquet"
    images, texts = [*pairs(6).values()][::2], [f"picture {i}" for i in range(6)]
    write_parquet(source, {"image": images, "text": texts}, group=4)
    arguments = [*world.recipe, *world.images, "--data.sources", str(source), "--out", str(again)]
    assert train(tmp_path, *arguments, "--run.save-every", "3", before=_kill_at_4).code
    result = train(tmp_path, *arguments, "--run.save-every", "3", "--resume", "True")
    assert result.code == 0 and "step 3/4" not in result.text, result.text
    assert metrics(again) == metrics(run)


def _kill_at_4() -> None:
    kill_in_save("0000004")


@pytest.fixture(scope="module")
def by_ratio(world: World) -> list[str]:
    """Arguments of a run on pictures of three ratios, five steps of which go through none of them as a whole."""
    shapes = [(40, 40)] * 9 + [(60, 30)] * 7 + [(24, 60)] * 8
    pictures = {f"{i}.png": encoded(noise(i, *shape)) for i, shape in enumerate(shapes)}
    write_folder(world.folder / "ratios", pictures | {f"{i}.txt": f"picture {i}".encode() for i in range(24)})
    sizes = ["--data.size", "64", "--transformer.sample-size", "16", "--data.buckets", "True", "--steps", "5"]
    return [*world.recipe, *sizes]


def test_a_run_by_ratio_continues_and_ranks_share_it(by_ratio: list[str], world: World, tmp_path: Path) -> None:
    """A killed run goes on bitwise in the middle of every bucket. Two ranks see the samples that one sees, with the
    same times, from a cache too."""
    one, again, folder, tokens = (
        tmp_path / "one",
        tmp_path / "again",
        world.folder / "ratios",
        world.folder / "ta_tok.pth",
    )
    arguments = [*by_ratio, "--data.sources", str(folder), "--data.ta-tok", str(tokens), "--run.save-every", "2"]
    result = train(tmp_path, *arguments, "--out", str(one))
    assert result.code == 0 and "3 of 40 sizes by ratio have pictures, 64x64 the most (9)" in result.text, result.text
    assert train(tmp_path, *arguments, "--out", str(again), before=_kill_at_4).code
    result = train(tmp_path, *arguments, "--out", str(again), "--resume", "True")
    assert result.code == 0 and "step 3/5" in result.text and "step 2/5" not in result.text, result.text
    assert metrics(again) == metrics(one) and len(metrics(one)) == 5
    with pytest.raises(ValueError, match="--size 32 gives buckets that are no whole latents; .* multiple of 64"):
        cache((str(folder),), world.vae, tmp_path / "cache", tokens, 3, 32, buckets=True)
    cache((str(folder),), world.vae, tmp_path / "cache", tokens, 3, 64, dtype="float32", buckets=True)
    cached = [*by_ratio, "--data.sources", str(tmp_path / "cache"), "--out", str(tmp_path / "two")]
    result = train(tmp_path, *cached, ranks=2)
    assert result.code == 0, result.text
    for got, want in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert got["error"] == pytest.approx(want["error"], rel=1e-4) and got["share"] == want["share"]


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)).astype(float) for file in sorted(folder.glob("*.png"))]


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image tokens by the four likeliest: so few borders between them that rounding, which the batch changes, tips no
    draw."""
    monkeypatch.setattr(Blip3oNext, "generate", partialmethod(Blip3oNext.generate, sampling=Sampling(top_k=4)))


@pytest.mark.usefixtures("few_tokens")
def test_generation_and_export(run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(CAPTIONS, run, tmp_path / "a", steps=2, n=2)
    said = capsys.readouterr().err
    assert "4 images; each: text " in said and "transformer" in said and "decoder" in said
    (tmp_path / "prompts.txt").write_text("a red cat\n\na red cat\ntwo dogs\ntwo dogs\n")
    generate((), run, tmp_path / "b", tmp_path / "prompts.txt", steps=2, batch=3)
    assert all(one.shape == (32 * 8, 32 * 8, 3) for one in pixels(tmp_path / "a"))
    assert_same_pictures(tmp_path / "a", tmp_path / "b")
    assert not np.array_equal(*pixels(tmp_path / "a")[:2])
    note = Image.open(next((tmp_path / "a").glob("00003*.png"))).info
    assert (note["prompt"], note["steps"], note["guidance"]) == ("two dogs", "2", "2.0")

    export(run, tmp_path / "out", dtype="float32")
    generate(CAPTIONS, tmp_path / "out", tmp_path / "c", steps=2, n=2)
    assert_same_pictures(tmp_path / "a", tmp_path / "c")
    config, network = load(tmp_path / "out")
    trained, (z, t, c) = load_run(run)[1], sana.inputs()
    assert config.condition.folder == tmp_path / "out" and config.condition.scale == 3
    assert torch.equal(network.transformer(z, t, t / 2, c), trained.transformer(z, t, t / 2, c))

    from emf.sample.emf_pipeline import EMFPipeline

    pipe: Any = EMFPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompt_embeds=c[:1], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (32, 32)


def test_a_moved_encoder_is_named_anew(run: Path, world: World, tmp_path: Path) -> None:
    """The run says which flag; with it, it loads and goes on."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    gone = tmp_path / "gone"
    for file in copy.rglob("config.json"):
        file.write_text(file.read_text().replace(f'"{world.base}"', f'"{gone}"'))
    with pytest.raises(ValueError, match=f"no folder {gone}, .* --text"):
        load(copy)
    (_, one), (config, two) = load(run), load(copy, world.base)
    assert config.condition.folder == world.base and one.encoder.state_dict().keys() == two.encoder.state_dict().keys()
    flags = [str(copy / "config.json"), "--out", str(copy), "--resume", "--steps", "5"]
    result = train(tmp_path, *flags)
    assert result.code == 2 and f"no folder {gone}" in result.text and "--condition.folder" in result.text, result.text
    result = train(tmp_path, *flags, "--condition.folder", str(world.base))
    assert result.code == 0 and "step 5/5" in result.text and "step 4/5" not in result.text, result.text


def test_flow_matching_baseline(run: Path, tmp_path: Path) -> None:
    generate(("a red cat",), run, tmp_path / "fm", steps=3, flow_matching=True)
    generate(("a red cat",), run, tmp_path / "emf", steps=3)
    (fm,), (emf,) = pixels(tmp_path / "fm"), pixels(tmp_path / "emf")
    assert abs(fm - emf).max() > 1


def test_the_language_model_tuned_with_the_transformer(world: World, tmp_path: Path) -> None:
    """Its own loss is in the total, its weights move and are saved, loaded and exported, sharded or not."""
    recipe = ["blip3o-next-3b", *world.recipe[1:], *world.images, "--steps", "2"]
    plain = train(tmp_path, *recipe, "--out", str(tmp_path / "plain"), "--condition.ar-weight", "0")
    one = train(tmp_path, *recipe, "--out", str(tmp_path / "one"))
    three = train(tmp_path, *recipe, "--out", str(tmp_path / "three"), "--zero.stage", "3", ranks=2)
    assert (plain.code, one.code, three.code) == (0, 0, 0), plain.text + one.text + three.text
    rows = {name: metrics(tmp_path / name) for name in ("plain", "one", "three")}
    # the cross entropy of a language model that knows nothing is the logarithm of its vocabulary, or more
    assert rows["one"][0]["loss"] - rows["plain"][0]["loss"] > 0.9 * np.log(316)
    assert rows["one"][0]["error"] == pytest.approx(rows["plain"][0]["error"], rel=1e-5)
    own = rows["one"][0]["loss"] - rows["plain"][0]["loss"]  # its weight is 1
    assert [rows[name][0]["lm_loss"] for name in ("one", "three")] == pytest.approx([own, own], rel=1e-4)
    assert "lm_loss" not in rows["plain"][0] and f"language model {own:.2f}" in one.text
    assert [r["loss"] for r in rows["three"]] == pytest.approx([r["loss"] for r in rows["one"]], rel=1e-4)
    weights = load_file(tmp_path / "one/checkpoints/step_0000002/model.safetensors")
    name = "encoder.language_model.model.layers.1.mlp.up_proj.weight"
    start = load_file(world.base / "language_model/model.safetensors")[name.removeprefix("encoder.language_model.")]
    assert not torch.equal(weights[name], start)
    export(tmp_path / "one", tmp_path / "out", base=world.vae, dtype="float32")
    _, network = load(tmp_path / "out")
    assert torch.equal(network.state_dict()[name], weights[name])
    # frozen again, from those weights: they stay in the checkpoints
    flags = ["--init", str(tmp_path / "one"), "--out", str(tmp_path / "again")]  # a run, which knows its encoder
    again = train(tmp_path, *world.recipe, *world.images, *flags, "--steps", "2")
    assert again.code == 0, again.text
    kept = load_file(tmp_path / "again/checkpoints/step_0000002/model.safetensors")
    assert torch.equal(kept[name], weights[name])


@pytest.mark.usefixtures("few_tokens")
def test_low_rank_adapters_on_the_3b(world: World, tmp_path: Path) -> None:
    """In bfloat16 and sharded as the recipe is, too. Their folder on the base makes what the run makes; the recipe that
    tunes its language model tunes it beside them."""
    flags = ["--lora.rank", "2", "--steps", "2"]
    recipe = [*world.recipe, *world.images, *flags]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"))
    assert result.code == 0, result.text
    half = ["--zero.stage", "2", "--zero.dtype", "bfloat16", "--zero.accumulation", "2"]
    result = train(tmp_path, *recipe, *half, "--out", str(tmp_path / "half"), ranks=2)
    assert result.code == 0, result.text
    first = [metrics(tmp_path / name)[0]["error"] for name in ("run", "half")]
    assert first[1] == pytest.approx(first[0], rel=0.02)  # bfloat16 of the same weights

    export(tmp_path / "run", tmp_path / "whole", dtype="float32")
    generate(CAPTIONS, tmp_path / "run", tmp_path / "a", steps=2)
    generate(CAPTIONS, tmp_path / "whole", tmp_path / "b", steps=2)
    assert_same_pictures(tmp_path / "a", tmp_path / "b")

    from emf.sample.emf_pipeline import EMFPipeline

    export(tmp_path / "run", tmp_path / "lora", dtype="float32", adapters=True)
    shutil.copytree(world.folder / "sana", tmp_path / "published" / "transformer")
    index = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "published" / "model_index.json").write_text(json.dumps(index))
    small: Any = EMFPipeline.from_pretrained(tmp_path / "published", adapters=tmp_path / "lora")
    trained, (z, t, c) = load_run(tmp_path / "run")[1], sana.inputs()
    want = trained.transformer(z, t, t / 2, c)
    torch.testing.assert_close(small.transformer(z, t, t / 2, c), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="leave out --base"):
        export(tmp_path / "run", tmp_path / "no", base=world.vae, adapters=True)

    tuned = ["blip3o-next-3b", *recipe[1:], "--zero.stage", "3"]
    result = train(tmp_path, *tuned, "--out", str(tmp_path / "tuned"), ranks=2)
    assert result.code == 0, result.text
    weights = load_file(tmp_path / "tuned/checkpoints/step_0000002/model.safetensors")
    start = load_file(world.base / "language_model/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(weights[f"encoder.language_model.{name}"], start[name])
    assert weights["transformer.transformer_blocks.1.attn2.to_k.lora_B.default.weight"].norm() > 0
    with pytest.raises(ValueError, match="trained its text encoder too"):
        export(tmp_path / "tuned", tmp_path / "no", adapters=True)


@pytest.mark.parametrize("tuned", [False, True])
def test_another_text_encoder(world: World, tuned: bool, tmp_path: Path) -> None:
    """The recipe of Gemma, with T5 in its place: flow matching first, then MeanFlow from its weights."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=20, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    common = [
        *world.recipe[5:],  # without BLIP3o-NEXT's scale
        *world.images[:2],
        "--condition.kind",
        "t5",
        "--condition.folder",
        str(tmp_path / "t5"),
    ]
    first = ["--objective", "flow_matching", "--transformer.dual-time", "False"]
    first += ["--trained", "transformer.", *(["encoder."] if tuned else []), "--init", str(world.base)]
    result = train(tmp_path, "sana-1.5-gemma", *common, *first, "--steps", "2", "--out", str(tmp_path / "fm"))
    assert result.code == 0, result.text
    weights = tmp_path / "fm/checkpoints/step_0000002/model.safetensors"
    assert any(k.startswith("encoder.") for k in load_file(weights)) == tuned
    second = ["--init", str(weights), "--steps", "2", "--out", str(tmp_path / "mf")]
    result = train(tmp_path, "sana-1.5-gemma", *common, *second)
    assert result.code == 0, result.text
    generate(("a red cat",), tmp_path / "mf", tmp_path / "pictures", vae=world.vae)
    config, network = load_run(tmp_path / "mf")
    assert len(pixels(tmp_path / "pictures")) == 1 and config.transformer.dual_time
    state = load_file(weights)
    for name in ("linear.weight", "emb.timestep_embedder.linear_1.weight"):
        start = state[f"transformer.time_embed.{name}"]
        assert torch.equal(network.state_dict()[f"transformer.time_embed.{name}"], start)
        if not tuned:
            continue
        base = load_file(world.base / "transformer.safetensors")[f"time_embed.{name}"]
        assert not torch.equal(start, base)  # what the branches were copied from had been trained


def test_what_does_not_fit_is_one_line(world: World, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    missing = [a for a in world.recipe if a not in ("--init", str(world.base))]
    cases: dict[str, list[str]] = {
        "needs --init": [*missing, *world.images],
        "say --transformer.num-layers 2": [*world.recipe, *world.images, "--transformer.num-layers", "3"],
        "no such source": [*world.recipe, *world.images, "--data.sources", str(tmp_path / "no such source")],
        "give --data.ta-tok or a cache": [*world.recipe, *world.images[:2]],
        "no ta_tok.pth": [*world.recipe, *world.images[:2], "--data.ta-tok", str(tmp_path / "no ta_tok.pth")],
        "set data.size": [*world.recipe, *world.images, "--data.size", "64"],
        "no weight's name begins with decoder.": [*world.recipe, *world.images, "--trained", "decoder."],
        "has no language_model": [*world.recipe, *world.images, "--condition.folder", str(world.vae)],
        "zero.offload needs": [*world.recipe, *world.images, "--zero.offload", "True"],
    }
    for message, arguments in cases.items():
        result = train(tmp_path, *arguments, *out)
        lines = [line for line in result.text.splitlines() if line.startswith("error:")]
        assert result.code == 2 and len(lines) == 1 and message in lines[0], (message, result.text)
        assert "Traceback" not in result.text
    with pytest.raises(ValueError, match="--vae"):
        generate(("a",), _without_vae(world, tmp_path), tmp_path / "none")


def _without_vae(world: World, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(world.folder / "run" / "checkpoints" / "step_0000004", copy)
    tree = json.loads((copy / "config.json").read_text())
    tree["data"]["vae"] = None
    (copy / "config.json").write_text(json.dumps(tree))
    return copy


def test_files_are_left_alone(run: Path, world: World, tmp_path: Path) -> None:
    before = files(world.base)
    export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        export(run, tmp_path / "out")
    assert files(world.base) == before
