"""How tests ask a server: in this process, or behind uvicorn on a port; and what they ask about."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import uvicorn
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from loracle.config import ServeConfig
from loracle.serving import app
from loracle.serving.protocol import bounded

TEXTS = ["good day", "bad " * 80, "", " ", "so — naïve 标题", "<|im_end|> good", "good day", "nul \0 and tab \t"]
RUNS = ("moods", "several", "pairs", "clicks")
SHOWN = ["bad headline 1", "good headline 2", "so headline 3"]


@contextmanager
def client_of(predictors, token=None, headers=None, **settings):
    application = app.create_app(predictors, ServeConfig(**settings), token=token)
    with TestClient(application, base_url="http://localhost", raise_server_exceptions=False, headers=headers) as client:
        yield client


@contextmanager
def running(app):
    """An application behind uvicorn, as it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http=bounded(1_000_000), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status):
    """The words of an answer that is none."""
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    return answer.json()["error"]["message"]


def figures(client):
    """Samples of /metrics: by name, or by name and labels where there are some."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for family in families for s in family.samples]
    return {(s.name, *(v for _, v in sorted(s.labels.items()))) if s.labels else s.name: s.value for s in samples}
