"""The app's server: on this machine alone unless another host is said, and without a word to any other.

gradio is asked for nothing but the page: what listens is bound here, so that a port that is taken is one line.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NEEDS_APP = "app: gradio is not installed, which makes the page; pip install 'emf-meanflow[app]'"
LOOPBACK = "127.0.0.1"
PORT = 7860
OWN = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"
HEADERS = [(b"content-security-policy", OWN), (b"referrer-policy", b"no-referrer")]
"""A browser loads nothing for the page from any other server, whatever gradio's page names."""


def quiet(folder: Path) -> None:
    """gradio as it shall be, before it is imported: it reports nothing, asks nobody for news, and serves files out of
    `folder` alone. Raises ValueError where it is not installed."""
    if find_spec("gradio") is None:
        raise ValueError(NEEDS_APP)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, whose port is another one where 0 was asked for. Raises ValueError in one line."""
    if not 0 <= port < 2**16:
        raise ValueError(f"app: port {port} (--port); expected 0 to {2**16 - 1}, 0 for any that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"app: port {port} of {host} is taken; give another --port, or 0 for any that is free"
            ) from None
        reason = error.strerror or str(error)
        raise ValueError(
            f"app: cannot listen on port {port} of {host}: {reason}; give another --host or --port"
        ) from None


def asgi(studio: Any, folder: Path) -> Any:
    """The app of a studio for a server of ASGI; `quiet` comes before."""
    import gradio as gr
    from fastapi import FastAPI

    from emf.app.screen import CSS, LIGHT, blocks, theme

    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    made = blocks(studio, folder)
    made.queue(default_concurrency_limit=1)  # one drawing at a time: two would share the processor and the memory
    looks: dict[str, Any] = dict(theme=theme(), css=CSS, js=LIGHT)
    offers: dict[str, Any] = dict(footer_links=[], run_history=False, mcp_server=False, ssr_mode=False, pwa=False)
    gr.mount_gradio_app(inner, made, "/", max_file_size="1kb", **looks, **offers)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *HEADERS]}
            await send(message)

        await inner(scope, receive, answered)

    return app


def serve(open_studio: Any, host: str = LOOPBACK, port: int = PORT) -> None:
    """Serve the app until it is interrupted. open_studio: makes the studio, after all else that can be wrong was looked
    at. Raises ValueError as it does, without gradio, and where the port is taken."""
    with TemporaryDirectory(prefix="emf-app-") as place:
        quiet(Path(place))
        with listen(host, port) as bound:
            studio = open_studio()
            import uvicorn

            settings = uvicorn.Config(asgi(studio, Path(place)), log_level="warning")
            name = f"[{host}]" if ":" in host else host
            print(f"open http://{name}:{bound.getsockname()[1]}", flush=True)
            print("Ctrl+C ends it", file=sys.stderr)
            uvicorn.Server(settings).run(sockets=[bound])
