"""``loracle serve``: runs are loaded, a socket is opened, and uvicorn answers until it is told to stop."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import uvicorn

from loracle.config import ServeConfig
from loracle.errors import UserError
from loracle.models.attention.cuda_graphs import ROWS
from loracle.models.build import share_weights
from loracle.models.scorer import Scorer
from loracle.runs.predictor import Predictor
from loracle.serving.app import create_app
from loracle.serving.limits import is_loopback
from loracle.serving.protocol import bounded

TOKEN = "LORACLE_TOKEN"
THREADS = "OMP_NUM_THREADS"


def serve(
    runs: Sequence[Path],
    settings: ServeConfig,
    *,
    base: str | None = None,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> None:
    """Serve runs, each under the name of its folder, until SIGTERM or Ctrl-C; requests at work are then finished.

    Raises:
        UserError: a host that others can reach without a token, two runs of one name, no such run, a port in use.
    """
    token = read_token(settings.token_file)
    if token is None and not is_loopback(settings.host):
        raise UserError(
            f"a token, since others can reach {settings.host or 'every address'}",
            "none",
            f"set {TOKEN}, pass --token-file, or leave out --host",
        )
    if THREADS not in os.environ:
        # Two threads of a product wait for each other; where one has to share its core with HTTP, both do nothing.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    predictors = load(runs, base=base, device=device, merge=settings.merge, log=log)
    listening = _listen(settings.host, settings.port)
    app = create_app(predictors, settings, token=token)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded(settings.max_body),
            log_level="warning",
            access_log=False,
            server_header=False,
            loop="asyncio",  # uvloop, where it is installed, takes one new connection at a time: seconds under overload
            proxy_headers=False,  # nobody asks where a request came from
            timeout_graceful_shutdown=int(settings.deadline) + 1,
        )
    )
    gc.collect()
    gc.freeze()  # else a collection now and then goes through all that was loaded: everybody waits for a third of a second
    # uvicorn drains at SIGTERM and then raises it again for who was there before: that is itself, and nothing is left to do.
    signal.signal(signal.SIGTERM, server.handle_exit)
    host, port = listening.getsockname()[:2]
    log(f"serving {', '.join(predictors)} at http://{f'[{host}]' if ':' in host else host}:{port}")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    log("stopped")


def load(
    runs: Sequence[Path],
    *,
    base: str | None = None,
    device: str = "auto",
    merge: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Predictor]:
    """Runs by the names of their folders; weights that they have in common are held once."""
    names = [run.resolve().name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError("runs of different names", f"{twice.pop()} twice", "rename one of the folders")
    predictors = {
        name: Predictor(run, base=base, device=device, merged=merge) for name, run in zip(names, runs, strict=True)
    }
    if freed := share_weights(p.scorer for p in predictors.values()):
        log(f"{freed / 1e6:,.0f} MB of weights that several runs have in common are held once")
    for name, predictor in predictors.items():
        if isinstance(predictor.scorer, Scorer) and predictor.scorer.record():
            log(f"{name}: forwards of up to {max(ROWS):,} tokens are recorded")
    return predictors


def read_token(path: str | None) -> str | None:
    """The token from a file or from ``LORACLE_TOKEN``; None where neither is named.

    Raises:
        UserError: no such file, or nothing in it that a header can carry.
    """
    where, token = TOKEN, os.environ.get(TOKEN)
    if path is not None:
        where = path
        try:
            token = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError("a file with a token for --token-file", f"{path}: {type(e).__name__}", "check it") from None
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        found = "other characters" if token else "nothing"
        raise UserError(
            f"a token of ASCII letters, digits or signs in {where}", found, "make one: openssl rand -hex 32"
        )
    return token


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address is not ours, or the port is in use.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
        # Inherited by every connection. asyncio sets it where a socket says that it is TCP, which these do not; without it
        # an answer's body waits 40 ms until the client has acknowledged the headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as e:
        raise UserError(
            f"a free port at {host}", f"{port}: {e.strerror or e}", "pass another --port or --host"
        ) from None
