"""The app's server: what it refuses before a network is read, and that a real browser draws by it, alone with it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from digits_run import small_run
from PIL import Image

from emf.app import serving
from emf.app.studio import Studio
from emf.cli.main import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 60
"""Seconds for what takes two on a quiet core."""
SET = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY")


def emf_app(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `emf app` says of what it refuses."""
    monkeypatch.setattr(sys, "argv", ["emf", "app", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if gradio were there; the environment is put back."""
    monkeypatch.setattr(serving, "find_spec", lambda name: object())
    for name in SET:
        monkeypatch.setenv(name, "")


def test_without_the_extra_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert emf_app(monkeypatch, capsys, str(tmp_path)) == f"error: {serving.NEEDS_APP}\n"


def test_a_taken_port_is_said_before_the_run_is_read(
    installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serving.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = emf_app(monkeypatch, capsys, str(tmp_path / "none"), "--port", str(port))
    assert error == f"error: app: port {port} of 127.0.0.1 is taken; give another --port, or 0 for any that is free\n"


@pytest.mark.parametrize(
    ("host", "port", "told"),
    [
        ("127.0.0.1", 70000, "port 70000 .*expected 0 to 65535"),
        ("127.0.0.1", -1, "port -1"),
        ("192.0.2.1", 0, "cannot listen on port 0 of 192.0.2.1: .*give another --host"),
        ("no.such.host.invalid", 0, "cannot listen on port 0 of no.such.host.invalid"),
    ],
)
def test_where_nobody_can_listen_is_said(host: str, port: int, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        serving.listen(host, port)
    assert "\n" not in str(error.value)


def test_a_run_that_is_none_is_said(
    installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = emf_app(monkeypatch, capsys, str(tmp_path / "none"), "--port", "0")
    assert error.startswith("error: ") and "none" in error and error.count("\n") == 1


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    with serving.listen(serving.LOOPBACK, 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, set[str]]]:
    """Where the app of a tiny run is served, and all addresses that this process connects to in the meantime."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    import uvicorn

    for name in SET:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    reached: set[str] = set()
    connect = socket.socket.connect

    def noted(self: socket.socket, to: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            reached.add(to[0])
        connect(self, to)

    monkeypatch.setattr(socket.socket, "connect", noted)
    (tmp_path / "served").mkdir()
    serving.quiet(tmp_path / "served")
    with serving.listen(serving.LOOPBACK, 0) as bound:
        app = serving.asgi(Studio(small_run(tmp_path / "run")), tmp_path / "served")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", reached
        server.should_exit = True
        thread.join(PATIENCE)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium on a narrow screen by night, which writes down what it asks of the network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(f"no {'chromedriver' if CHROMIUM else 'Chromium'} on the path")
    how = webdriver.ChromeOptions()
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=500,900"):
        how.add_argument(f"--{switch}")
    how.binary_location = CHROMIUM
    how.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    how.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=how, service=webdriver.ChromeService(DRIVER))
    night = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", night)
    yield driver
    driver.quit()


def test_a_browser_draws(address: tuple[str, set[str]], browser: Any, tmp_path: Path) -> None:
    """Type, click: the picture changes with the seed and not without. Nothing comes from anywhere else."""
    import httpx

    url, reached = address
    browser.get(url)

    def found(selector: str) -> list[Any]:
        return list(browser.find_elements("css selector", selector))

    def wait(ready: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < end, what
            time.sleep(0.05)

    def fill(selector: str, text: str) -> None:
        """As a person does: all that stands there is marked and written over."""
        (field,) = found(selector)
        field.send_keys("\ue009" + "a" + "\ue000")
        field.send_keys(text)

    def draw(button: str = "#draw") -> list[bytes]:
        """The pixels of the pictures after a click, each one new on the page."""
        browser.execute_script("document.querySelectorAll('#drawn figure').forEach(x => x.remove())")
        found(button)[0].click()
        wait(lambda: len(found("#drawn figure img")) == 5, "five pictures")
        wait(lambda: found("#download:not([disabled]):not(.disabled)"), "the download")
        sources = [x.get_attribute("src").removeprefix("data:image/png;base64,") for x in found("#drawn figure img")]
        return [Image.open(io.BytesIO(base64.b64decode(source))).tobytes() for source in sources]

    wait(lambda: found("#draw"), "the page")
    fill("#caption textarea", "two blue threes")
    first = draw()
    assert len(set(first)) == 5
    assert [x.text for x in found("#drawn h2")] == ["two blue threes"]
    assert all("transformer" in x.text for x in found("#drawn figure p"))
    assert draw() == first
    fill("#seed input", "5")
    other = draw()
    assert not set(other) & set(first)
    fill("#seed input", "0")
    assert draw() == first
    assert not set(draw("#another")) & set(first + other)
    wait(lambda: len(found("#gallery .grid-container button")) == 25, "the gallery")

    found("#download")[0].click()
    wait(lambda: [*(tmp_path / "downloads").glob("*.zip")], "the download")
    (pack,) = (tmp_path / "downloads").glob("*.zip")
    assert len(zipfile.ZipFile(pack).namelist()) == 6 and pack.name.startswith("two_blue_threes_seed_")

    fill("#caption textarea", "two blue cats")
    found("#draw")[0].click()
    wait(lambda: found("#drawn [role=alert]"), "what is wrong")
    assert "word 'cats'" in found("#drawn [role=alert]")[0].text

    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "too wide"
    assert not found("body.dark")
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert asked and not [x for x in asked if not x.startswith((url, "data:", "blob:"))]
    assert reached <= {"127.0.0.1", "localhost", "::1"}
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
