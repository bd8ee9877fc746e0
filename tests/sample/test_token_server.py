"""Image tokens from an engine: a server of OpenAI's protocol, which a small one around the tiny model stands for, and
vLLM's offline interface, which a module of the same names stands for. Neither vLLM nor SGLang itself runs here."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from digits_run import small_run
from PIL import Image
from text_models import CAPTIONS, IMAGE_TOKENS, QWEN, TOKENIZER, blip3o
from tiny import tiny_sana
from transformers import AutoTokenizer

from bench.completions import Answer, Server, served
from emf.cli.generate import generate
from emf.conditioning.blip3o import Blip3oNext, prompt_ids
from emf.config import ConditionConfig, Config
from emf.evaluate import pictures as evaluated
from emf.evaluate.drawing import Drawing
from emf.evaluate.pictures import Item, draw_pictures
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.sample import token_server
from emf.sample.image_tokens import drawn_by, tokenize
from emf.sample.sampler import Sampler
from emf.sample.token_engine import Vllm, begin, find_engine
from emf.sample.token_server import TokenServer, base_of


@pytest.fixture
def server() -> Iterator[Server]:
    with served(QWEN, TOKENIZER) as made:
        yield made


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_server, "PAUSES", (0.01, 0.02, 0.03))


def network() -> TextToImage:
    torch.manual_seed(3)
    transformer = Transformer(tiny_sana(caption_channels=20)).eval()
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return TextToImage(blip3o(), transformer).eval()


def sampler_of(engine: Any = None) -> Sampler:
    made = network()
    sizes, condition = made.transformer.config, ConditionConfig("blip3o", Path("folder"))
    return Sampler(Config("converted", "meanflow", transformer=sizes, condition=condition), made, engine=engine)


def test_a_request_says_all_that_a_draw_depends_on(server: Server) -> None:
    engine, encoder = TokenServer(server.url + "/v1/"), blip3o()
    engine.begin(encoder, Path())
    drawn = drawn_by(engine, encoder, CAPTIONS, [5, 2**40 + 6, 7])
    assert engine.said == "vllm server, model tiny"
    rows = {tuple(body["prompt"]): body for body in server.asked}
    for row, seed in zip(prompt_ids(encoder, CAPTIONS), (5, (2**40 + 6) % 2**31, 7), strict=True):
        asked = rows[(*row, *encoder.head)]
        assert asked["seed"] == seed and asked["max_tokens"] == IMAGE_TOKENS
        assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (1.0, 1200, 0.95)
        assert asked["ignore_eos"] is True and asked["return_token_ids"] is True and asked["model"] == "tiny"
        assert (asked["repetition_penalty"], asked["min_p"]) == (1.0, 0.0)
    want = [server.drawn(rows[(*row, *encoder.head)]) for row in prompt_ids(encoder, CAPTIONS)]
    assert drawn.tolist() == want and drawn.dtype == torch.int64


def test_the_picture_is_that_of_the_same_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TokenServer(server.url)
    drawn: list[torch.Tensor] = []

    def kept(self: Blip3oNext, captions: Any, *_: Any, **__: Any) -> torch.Tensor:
        return drawn[0]

    sampler = sampler_of(engine)
    pictures = sampler.images(CAPTIONS, steps=2)
    seeds = [2**40 + n for n in range(len(CAPTIONS))]
    drawn.append(drawn_by(engine, sampler.network.encoder, CAPTIONS, seeds))
    monkeypatch.setattr(Blip3oNext, "generate", kept)  # these tokens, by the way of the language model here
    here = sampler_of()
    assert here.told == {} and sampler.told == {"image_tokens": "vllm server, model tiny"}
    assert torch.equal(here.images(CAPTIONS, steps=2), pictures)
    drawn[0] = drawn[0].roll(1, 0)
    assert not torch.equal(here.images(CAPTIONS, steps=2), pictures)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://host:99999",
        "http://a b",
        "http://h/?q=1",
        "http://.",
        "http://a..b",
        "http://" + "a" * 70,
        "http://h/\u00fc",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"^image tokens: .* is no server's address; expected one as http://127"):
        find_engine(url)


def test_addresses() -> None:
    for url in ("http://h:80", "http://h:80/", "http://h:80/v1", "http://h:80/v1/completions"):
        assert base_of(url) == "http://h:80"
    assert base_of("https://h/a/v1") == "https://h/a"
    with pytest.raises(ValueError, match="EMF_AR_KEY"):
        base_of("http://user:secret@h")


def test_nobody_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(
        ValueError, match=rf"^image tokens: no server answers at http://127.0.0.1:{port} \(Conn.*vllm serve"
    ):
        TokenServer(f"http://127.0.0.1:{port}")


def completions(answer: Answer) -> Any:
    return lambda path, body, own: answer if path == "/v1/completions" else own()


def choice(ids: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": ids}]}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((400, {"error": {"message": "too\nlong"}}), r"completions answers 400: too long$"),
        ((422, {"object": "error", "message": "no such thing"}), r"answers 422: no such thing$"),
        ((404, {"detail": "Not Found"}), r"answers 404: Not Found$"),
        ((401, {"error": "Unauthorized"}), r"answers 401: Unauthorized; put its key into .* EMF_AR_KEY$"),
        ((400, b"\x1b[31m<html>"), r"answers 400: \?\[31m<html>$"),
        ((200, b"<html>hello</html>"), r"completions answers is not JSON: Expecting value: '<html>hello</html>'"),
        ((200, {"choices": []}), r"gives no token ids back .*expected vLLM from 0.10.2"),
        ((200, {"choices": [{"text": "a"}]}), r"gives no token ids back"),
        ((200, choice(["1"] * IMAGE_TOKENS)), r"gives no token ids back"),
        ((200, choice([3] * (IMAGE_TOKENS - 1))), r"gives 5 tokens for 'a red cat'; expected 6"),
        ((200, choice([3] * 5 + [10**6])), r"gives the token 1000000 for 'a red cat'; .*has \d+, so it is another"),
        ((200, choice([3] * 5 + [-1])), r"gives the token -1 for"),
    ],
)
def test_answers_that_cannot_be_used_are_one_line(server: Server, answer: Answer, said: str) -> None:
    server.answer = completions(answer)
    with pytest.raises(ValueError, match=said) as error:
        tokenize(blip3o(), CAPTIONS[:1], [0], engine=TokenServer(server.url))
    assert str(error.value).startswith("image tokens: ") and "\n" not in str(error.value)
    assert len(server.asked) == 1


def test_a_server_in_trouble_is_asked_again(server: Server) -> None:
    engine, encoder, times = TokenServer(server.url), blip3o(), iter(range(100))

    def troubled(until: int) -> Any:
        def answer(path: str, body: Any, own: Any) -> Answer:
            return (503, {"error": {"message": "loading"}}) if next(times) < until else own()

        return answer

    server.answer = troubled(3)
    drawn_by(engine, encoder, CAPTIONS[:1], [0])
    assert len(server.asked) == 4
    server.answer = troubled(99)
    with pytest.raises(ValueError, match=r"completions answers 503: loading$"):
        drawn_by(engine, encoder, CAPTIONS[:1], [0])
    assert len(server.asked) == 8
    server.server_close()
    server.shutdown()
    with pytest.raises(ValueError, match="no server answers at"):
        drawn_by(engine, encoder, CAPTIONS[:1], [0])


def test_requests_are_on_their_way_together(server: Server) -> None:
    meeting = threading.Barrier(len(CAPTIONS), timeout=20)

    def answer(path: str, body: Any, own: Any) -> Answer:
        if path == "/v1/completions":
            meeting.wait()
        return own()

    server.answer = answer
    drawn_by(TokenServer(server.url), blip3o(), CAPTIONS, [1, 2, 3])


def test_silence_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TokenServer(server.url)
    monkeypatch.setattr(token_server, "ANSWERED", 0.1)
    server.seconds = 1
    with pytest.raises(ValueError, match=r"gives no whole answer within 0.1 s$"):
        drawn_by(engine, blip3o(), CAPTIONS[:1], [0])


def test_another_vocabulary_is_seen_before_the_first_draw(server: Server) -> None:
    engine = TokenServer(server.url)
    server.answer = lambda path, body, own: (200, {"tokens": [1, 2, 3]}) if path == "/tokenize" else own()
    with pytest.raises(ValueError, match="the model tiny of http.* has another vocabulary than the run"):
        engine.begin(blip3o(), Path())
    server.answer = lambda path, body, own: (404, {"detail": "Not Found"}) if path == "/tokenize" else own()
    engine.begin(blip3o(), Path())  # a server without that endpoint


def test_the_key_and_no_proxy_of_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("EMF_AR_KEY", "word")
    seen: list[str | None] = []
    handle = server.RequestHandlerClass._answered  # type: ignore[attr-defined]

    def kept(self: Any, body: Any) -> None:
        seen.append(self.headers["Authorization"])
        handle(self, body)

    monkeypatch.setattr(server.RequestHandlerClass, "_answered", kept)
    TokenServer(server.url)
    assert seen == ["Bearer word"]


def test_a_redirect_is_refused_and_takes_no_key_along(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMF_AR_KEY", "word")
    engine, handler, asked = TokenServer(server.url), server.RequestHandlerClass, list[str]()

    def redirected(self: Any, body: Any) -> None:
        asked.append(self.path)
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{server.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    monkeypatch.setattr(handler, "_answered", redirected)
    with pytest.raises(ValueError, match=r"^image tokens: \S+completions answers 302, a redirect to http://localhost:"):
        drawn_by(engine, blip3o(), CAPTIONS[:1], [0])
    assert asked == ["/v1/completions"]


class FakeVllm(ModuleType):
    """The names of vLLM's offline interface that are used, around the tiny model."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = ModuleSpec("vllm", None)
        self.__version__ = "0.0"
        self.LLM, self.loaded = self._llm, list[dict[str, Any]]()

    class SamplingParams(SimpleNamespace):
        def __init__(self, *, temperature: float, top_k: int, top_p: float, max_tokens: int, **how: Any) -> None:
            assert how.keys() == {"ignore_eos", "detokenize", "seed"} and how["ignore_eos"] and not how["detokenize"]
            super().__init__(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, **how)

    def _llm(self, **how: Any) -> Any:
        if not Path(how["model"]).is_dir():
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        self.loaded.append(how)

        def drawn(prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            with served(QWEN, TOKENIZER) as server:
                bodies = [
                    {"prompt": p["prompt_token_ids"], **vars(how)} for p, how in zip(prompts, params, strict=True)
                ]
                ids = [server.drawn(body) for body in bodies]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(one))]) for one in ids]

        return SimpleNamespace(generate=drawn)


def test_vllm_in_this_process(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws as by the server, which has the same random numbers here."""
    fake, encoder = FakeVllm(), blip3o()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = find_engine("vllm")
    assert isinstance(engine, Vllm) and engine.said == "vllm 0.0"
    with pytest.raises(ValueError, match=r"vLLM cannot load .*none: Engine core initialization failed\.$"):
        engine.begin(encoder, tmp_path / "none")
    engine.begin(encoder, tmp_path)
    (how,) = fake.loaded
    assert how["model"] == str(tmp_path) and how["max_model_len"] >= 2048 + 2 + IMAGE_TOKENS
    drawn = drawn_by(engine, encoder, CAPTIONS, [1, 2, 3])
    assert torch.equal(drawn, drawn_by(TokenServer(server.url), encoder, CAPTIONS, [1, 2, 3]))


def test_engines_read_the_folder_of_the_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made = FakeVllm(), network()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    (tmp_path / "language_model").mkdir()
    sizes, condition = made.transformer.config, ConditionConfig("blip3o")
    config = Config("converted", "meanflow", transformer=sizes, condition=condition, init=tmp_path)
    begin(find_engine("vllm"), tmp_path / "run", config, made)
    assert fake.loaded[0]["model"] == str(tmp_path / "language_model")
    made.own_encoder = {"encoder.language_model.lm_head.weight"}
    tuned = "run tuned its language model, and an engine reads one from a folder: emf export the run, and draw from the"
    with pytest.raises(ValueError, match=f"{tuned} export$"):
        begin(find_engine("vllm"), tmp_path / "run", config, made)
    with pytest.raises(ValueError, match=f"{tuned} export, whose language_model the server then serves$"):
        begin(TokenServer(server.url), tmp_path / "run", config, made)


def test_vllm_draws_on_the_first_gpu_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm())
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    find_engine("vllm", torch.device("cuda", 0))
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"  # stdout is for the files' names
    with pytest.raises(ValueError, match="^image tokens: --ar vllm draws on the first GPU, for one process; choose"):
        find_engine("vllm", torch.device("cuda", 1))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^image tokens: --ar vllm draws on the first GPU, for one process; choose"):
        find_engine("vllm", torch.device("cpu"))


def test_vllm_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"^image tokens: --ar vllm imports vllm, which is not there .*--ar-server$"):
        find_engine("vllm")


def test_engines_that_cannot_act(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = small_run(tmp_path / "run"), tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"^generate: --ar-server has no effect: .* draws no image tokens; leave it out$"
    ):
        generate(("a red seven",), run, out, ar_server=server.url)
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm())
    with pytest.raises(ValueError, match=r"^generate: --ar has no effect: .* draws no image tokens; leave it out$"):
        generate(("a red seven",), run, out, ar="vllm")
    for both in (
        lambda: generate(("a",), run, out, ar="vllm", ar_server="x"),
        lambda: Drawing(ar="vllm", ar_server="x"),
    ):
        with pytest.raises(ValueError, match="--ar and --ar-server both say who draws them; give one of the two$"):
            both()
    assert not out.exists()


def test_generate_and_evaluate_draw_by_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from exported import write_start
    from image_files import small_autoencoder

    start = write_start(tmp_path / "start", tmp_path / "source")
    small_autoencoder().save_pretrained(tmp_path / "vae" / "vae")
    tokenizer = AutoTokenizer.from_pretrained(start / "language_model")
    image = tokenizer.convert_tokens_to_ids("<I0>")

    def answer(path: str, body: Any, own: Any) -> Answer:
        if path != "/v1/completions":
            return own()
        generator = torch.Generator().manual_seed(body["seed"])
        return 200, choice((image + torch.randint(50, (body["max_tokens"],), generator=generator)).tolist())

    out = tmp_path / "out"
    with served(QWEN, tokenizer) as server:
        server.answer = answer
        how: dict[str, Any] = dict(flow_matching=True, vae=tmp_path / "vae")
        generate(("a cat",), start, out, **how, n=2, batch=1, ar_server=server.url)
        drawing = Drawing(checkpoint=start, steps=(1,), batch=1, **how)
        pictures = [Item(f"{i}.png", "a cat", i) for i in range(2)], {}, tmp_path / "drawn"
        threads, save = list[threading.Thread](), evaluated.save
        monkeypatch.setattr(evaluated, "save", lambda *how: threads.append(threading.current_thread()) or save(*how))
        draw_pictures(*pictures, replace(drawing, ar_server=server.url), "cpu")
    # saved where they are drawn, without a wait for the next text stage
    assert len(threads) == 2 and threading.main_thread() not in threads
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["image_tokens"] for row in rows] == ["vllm server, model tiny"] * 2
    first = Image.open(out / rows[0]["file"])
    assert first.info["image_tokens"] == "vllm server, model tiny"
    again = Image.open(tmp_path / "drawn" / "1" / "images" / "0.png")
    assert np.array_equal(np.asarray(first)[::8, ::8], np.asarray(again))  # generate enlarges what is small
    assert {body["max_tokens"] for body in server.asked} == {729} and len({body["seed"] for body in server.asked}) == 2
    assert " ms in all" in capsys.readouterr().err
    with pytest.raises(ValueError, match="image_tokens"):  # images that an engine drew are not mixed with others
        draw_pictures(*pictures, drawing, "cpu")
