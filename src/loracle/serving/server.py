"""``loracle serve``: load the runs, open a socket, and let uvicorn answer until it is stopped."""

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
from loracle.serving.protocol import bounded_protocol

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
    """Serve runs by the names of their folders until SIGTERM or Ctrl-C, then finish the requests in progress.

    Raises:
        UserError: a public host without a token, two runs of one name, no such run, or a port in use.
    """
    token = read_token(settings.token_file)
    if token is None and not is_loopback(settings.host):
        raise UserError(
            f"A token is required, since other machines can reach {settings.host or 'every address'}.",
            f"Set {TOKEN}, pass --token-file, or leave out --host.",
        )
    if THREADS not in os.environ:
        # Threads of a matrix product wait for each other, so one that shares its core with HTTP stalls them all.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    predictors = load(runs, base=base, device=device, merge=settings.merge, log=log)
    listener = _listen(settings.host, settings.port)
    app = create_app(predictors, settings, token=token)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(settings.max_body),
            log_level="warning",
            access_log=False,
            server_header=False,
            loop="asyncio",  # uvloop accepts one new connection at a time, which takes seconds under overload
            proxy_headers=False,  # the client's address is not used
            timeout_graceful_shutdown=int(settings.deadline) + 1,
        )
    )
    gc.collect()
    gc.freeze()  # otherwise each full collection scans the loaded models and stops all requests for a third of a second
    # At SIGTERM uvicorn drains and then raises the signal again for the handler that was set before. Make that its own.
    signal.signal(signal.SIGTERM, server.handle_exit)
    host, port = listener.getsockname()[:2]
    log(f"serving {', '.join(predictors)} at http://{f'[{host}]' if ':' in host else host}:{port}")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    log("stopped")


def load(
    runs: Sequence[Path],
    *,
    base: str | None = None,
    device: str = "auto",
    merge: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Predictor]:
    """Load runs by the names of their folders. Runs of one base share its weights in memory."""
    names = [run.resolve().name for run in runs]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(f"Two runs have the name {duplicates.pop()}.", "Rename one of the folders.")
    predictors = {
        name: Predictor(run, base=base, device=device, merged=merge) for name, run in zip(names, runs, strict=True)
    }
    if freed := share_weights(p.scorer for p in predictors.values()):
        log(f"runs share {freed / 1e6:,.0f} MB of weights")
    for name, predictor in predictors.items():
        if isinstance(predictor.scorer, Scorer) and predictor.scorer.record():
            log(f"{name}: CUDA graphs for micro-batches of up to {max(ROWS):,} tokens")
    return predictors


def read_token(path: str | None) -> str | None:
    """Read the token from a file or from ``LORACLE_TOKEN``. Returns None where neither is set.

    Raises:
        UserError: the file cannot be read, or the token cannot be sent in a header.
    """
    source, token = TOKEN, os.environ.get(TOKEN)
    if path is not None:
        source = path
        try:
            token = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"Cannot read the token file {path} ({type(e).__name__}).", "Check --token-file.") from None
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        problem = "contains other characters than ASCII letters, digits and signs" if token else "is empty"
        raise UserError(f"The token in {source} {problem}.", "Create one with: openssl rand -hex 32")
    return token


def _listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        UserError: this machine does not have the address, or the port is in use.
    """
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
        # Connections inherit it. asyncio sets it only on sockets that declare TCP, which these do not. Without it the body of
        # an answer waits 40 ms until the client acknowledges the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as e:
        raise UserError(
            f"Cannot listen at {host}, port {port}: {e.strerror or e}.", "Pass another --port or --host."
        ) from None
