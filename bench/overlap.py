"""Pictures a second with and without the text stage of a batch running while the one before is drawn.

The image tokens come from a small server of the completions protocol that answers after a made-up time, whatever the
number of requests, as an engine draws them together: what is measured is the way the stages follow each other, not an
engine. The language model is a toy; the transformer's time is real. Both ways in turn, on the same machine. Writes
profiles/cpu/overlap.json."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.completions import Answer, served
from bench.records import PROFILES, revision, write_record
from emf.conditioning.blip3o import Blip3oNext, SpecialTokens
from emf.conditioning.small import Connector
from emf.config import ConditionConfig, Config
from emf.errors import as_command
from emf.model.sizes import TransformerConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.sample.image_batches import batches_of
from emf.sample.sampler import Sampler
from emf.sample.sampling_settings import Settings
from emf.sample.token_server import TokenServer

SIZES = TransformerConfig(
    in_channels=32,
    out_channels=32,
    num_attention_heads=8,
    attention_head_dim=32,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=64,
    caption_channels=64,
    sample_size=16,
    dual_time=True,
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"]
CODES = 1000


def encoder() -> Blip3oNext:
    """BLIP3o-NEXT's with 729 image tokens, as a toy of two layers that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {word: i for i, word in enumerate([*SPECIAL, *(f"<I{i}>" for i in range(CODES)), "a", "picture"])}
    split = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    split.add_special_tokens(list(words)[: len(SPECIAL) + CODES])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    tokens = SpecialTokens(words["<im_start>"], words["<im_end>"], words["<S0>"], words["<I0>"], CODES, 3)
    return Blip3oNext(Qwen3ForCausalLM(config).eval(), tokenizer, tokens, Connector(64, 64))


def seconds(sampler: Sampler, how: Settings, count: int, overlaps: bool) -> float:
    """Of a picture, over `count` batches."""
    sampler.overlaps = overlaps
    captions = ["a picture"] * (count * how.batch)
    start = time.perf_counter()
    for _ in sampler.draw(batches_of(captions, how), lambda _, images: images):
        pass
    return (time.perf_counter() - start) / len(captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds until a request is answered")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=4, help="batches of a measurement")
    asked = parser.parse_args()
    torch.manual_seed(0)
    text = encoder()
    network = TextToImage(text, Transformer(SIZES)).eval()
    config = Config(
        "converted", "meanflow", transformer=SIZES, condition=ConditionConfig("blip3o", Path("language_model"))
    )

    def answer(path: str, body: dict[str, Any], own: Callable[[], Answer]) -> Answer:
        if path != "/v1/completions":
            return own()
        time.sleep(asked.latency)
        generator = torch.Generator().manual_seed(body["seed"])
        ids = len(SPECIAL) + torch.randint(CODES, (body["max_tokens"],), generator=generator)
        return 200, {"choices": [{"token_ids": ids.tolist()}]}

    rows = []
    with served(None, text.tokenizer) as server:
        server.answer = answer
        engine = TokenServer(server.url)
        engine.begin(text, Path())
        sampler = Sampler(config, network, engine=engine)
        for batch in (1, 2, 4):
            how = Settings(steps=asked.steps, guidance=2.0, batch=batch)
            seconds(sampler, how, 1, False)
            sampler.seconds.clear()
            pairs = []
            for i in range(asked.rounds):
                order = (False, True) if i % 2 else (True, False)
                took = {overlaps: seconds(sampler, how, asked.count, overlaps) for overlaps in order}
                pairs.append((took[False], took[True]))
            ratios = sorted(a / b for a, b in pairs)
            rows.append(
                dict(
                    batch=batch,
                    apart=1 / statistics.median(a for a, _ in pairs),
                    together=1 / statistics.median(b for _, b in pairs),
                    ratio=statistics.median(ratios),
                    least=ratios[0],
                    most=ratios[-1],
                    stages={k: v / (2 * asked.rounds * asked.count * batch) for k, v in sampler.seconds.items()},
                )
            )
            print(rows[-1], flush=True)
    record = dict(
        latency=asked.latency,
        steps=asked.steps,
        rounds=asked.rounds,
        batches=asked.count,
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in network.transformer.parameters()),
        torch=torch.__version__,
        commit=revision(),
        rows=rows,
    )
    write_record(PROFILES / "cpu" / "overlap.json", record)


if __name__ == "__main__":
    with as_command():
        main()
