"""Clients for tests of the server, in this process or behind uvicorn on a port, and the texts they send."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import uvicorn
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from loracle.config import ServeConfig
from loracle.serving import app
from loracle.serving.protocol import bounded_protocol

TEXTS = ["good day", "bad " * 80, "", " ", "so — naïve 标题", "<|im_end|> good", "good day", "nul \0 and tab \t"]
RUNS = ("moods", "several", "pairs", "clicks")
TITLES = ["bad headline 1", "good headline 2", "so headline 3"]


@contextmanager
def client_for(predictors, token=None, headers=None, **settings):
    application = app.create_app(predictors, ServeConfig(**settings), token=token)
    with TestClient(application, base_url="http://localhost", raise_server_exceptions=False, headers=headers) as client:
        yield client


@contextmanager
def serve_on_port(app):
    """Run an application behind uvicorn, as ``loracle serve`` does. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=bounded_protocol(1_000_000), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def post(client, path, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response, status):
    """The message of an error response."""
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == status
    return response.json()["error"]["message"]


def read_metrics(client):
    """Samples of /metrics, keyed by name, or by name and label values."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for family in families for s in family.samples]
    return {(s.name, *(v for _, v in sorted(s.labels.items()))) if s.labels else s.name: s.value for s in samples}
