"""What ``serve_load.py`` has locust do: one headline a request; status, milliseconds and time of every answer are noted.

LOAD_RATE is of all users together, requests/s; without it each asks again as soon as it is answered.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

from locust import FastHttpUser, constant, constant_throughput, events, task

from loracle.data.demo import bbc_headlines

TEXTS = [headline for headline, _ in bbc_headlines()]
RATE, USERS = float(os.environ.get("LOAD_RATE", 0)), int(os.environ.get("LOAD_USERS", 1))
ANSWERS: list[tuple[int, float, float]] = []


class Reader(FastHttpUser):
    wait_time = constant_throughput(RATE / USERS) if RATE else constant(0)
    network_timeout = connection_timeout = 60.0

    @task
    def ask(self) -> None:
        self.client.post("/v1/classify", json={"texts": [random.choice(TEXTS)]})


@events.request.add_listener
def note(response_time: float, response: object, **more: object) -> None:
    """0: no answer at all."""
    ANSWERS.append((getattr(response, "status_code", 0) or 0, response_time, time.time()))


@events.quitting.add_listener
def save(environment: object, **more: object) -> None:
    Path(os.environ["LOAD_ANSWERS"]).write_text(json.dumps(ANSWERS))
