"""``loracle serve`` and a transformers pipeline behind FastAPI under the same load, and both under ten times their best.

    python benchmarks/serve_load.py                              # a dated table in benchmarks/results/, about 14 minutes
    python benchmarks/serve_load.py --seconds 3 --rounds 1       # does it work?
    python benchmarks/serve_load.py --cores 4                    # the servers get four cores, k6 the others
    python benchmarks/serve_load.py --size 7b --users 1 8 32 128 # Qwen2.5-7B's shape, random weights: for a GPU, no hub needed
    python benchmarks/serve_load.py --peer queue --folder FOLDER --port 8001   # a peer alone

Same weights (a run of the demo's topics, and its export to transformers), dtype, headlines, machine, and k6 on it. The peer is
written as in transformers' page "Web server inference": a queue, and one worker that scores all waiting texts as one batch.
Its forward pass runs in a thread, so the event loop continues. ``threads`` is the plain version without a queue.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from gpu_train import SIZES
from results import dtype_name, write_table

HERE = Path(__file__).parent
LORACLE = [sys.executable, "-m", "loracle"]
USERS = (1, 8, 32)
OVERLOAD = 10  # times the best throughput of a server
CROWD = 800  # users of the overload
PORT = 8765


# --- the peer ---------------------------------------------------------------------------------------------------------


def peer(folder: str, how: str, port: int) -> None:
    """A pipeline behind FastAPI; ``how`` is queue or threads."""
    import asyncio
    from contextlib import asynccontextmanager

    import torch
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = pipeline("text-classification", model=folder, device=device, dtype=getattr(torch, dtype_name()))
    waiting: asyncio.Queue = asyncio.Queue()

    class Texts(BaseModel):
        texts: list[str]

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while True:
                try:
                    batch.append(await asyncio.wait_for(waiting.get(), timeout=0.001))
                except TimeoutError:
                    break
            texts = [text for text, _ in batch]
            found = await asyncio.to_thread(pipe, texts, truncation=True, top_k=None, batch_size=len(texts))
            for (_, answer), one in zip(batch, found, strict=True):
                await answer.put(one)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    if how == "queue":

        @app.post("/v1/classify")
        async def classify(asked: Texts) -> Any:
            answers: list[asyncio.Queue] = [asyncio.Queue() for _ in asked.texts]
            for pair in zip(asked.texts, answers, strict=True):
                await waiting.put(pair)
            return [await answer.get() for answer in answers]

    else:

        @app.post("/v1/classify")
        def classify_in_a_thread(asked: Texts) -> Any:
            return pipe(asked.texts, truncation=True, top_k=None)

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


# --- one measurement --------------------------------------------------------------------------------------------------


def on_cores(command: list[Any], first: int, count: int) -> list[str]:
    """The command, limited to ``count`` of this machine's cores. 0 means all."""
    return [*(["taskset", "-c", f"{first}-{first + count - 1}"] if count else []), *map(str, command)]


@contextmanager
def server(command: list[str]) -> Iterator[psutil.Process]:
    """A server that is ready."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1500):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/readyz", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"failed: {command}") from None
                time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def load(seconds: float, users: int, rate: float = 0.0, *, cores: int = 0) -> np.ndarray:
    """Status (0: no answer), milliseconds and end time in seconds of every request, ``[N, 3]``.

    Requests that run at the end are waited for.
    """
    from loracle.data.demo import bbc_headlines

    with tempfile.TemporaryDirectory() as scratch:
        answers, texts = Path(scratch) / "answers.csv", Path(scratch) / "texts.json"
        texts.write_text(json.dumps([headline for headline, _ in bbc_headlines()]))
        asked = {"URL": f"http://127.0.0.1:{PORT}/v1/classify", "TEXTS": texts, "USERS": users, "RATE": round(rate),
                 "SECONDS": f"{seconds:g}"}  # fmt: skip
        k6 = shutil.which("k6", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        command: list[Any] = [k6, "run", "--quiet", "--no-usage-report", "--out", f"csv={answers}"]
        command += [word for name, value in asked.items() for word in ("-e", f"{name}={value}")]
        environment = {**os.environ, "K6_CSV_TIME_FORMAT": "unix_milli"}
        command = on_cores(
            [*command, HERE / "serve_load_user.js"], cores, (os.cpu_count() or 1) - cores if cores else 0
        )
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        with answers.open(newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["metric_name"] == "http_req_duration"]
        found = [(float(r["status"]), float(r["metric_value"]), float(r["timestamp"]) / 1000) for r in rows]
        return np.array(found).reshape(-1, 3)


@contextmanager
def memory_of(process: psutil.Process) -> Iterator[list[float]]:
    """Memory of a process in MB, twice a second."""
    memory, over = [process.memory_info().rss / 1e6], threading.Event()

    def measure() -> None:
        while not over.wait(0.5):
            memory.append(process.memory_info().rss / 1e6)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def figures(answers: np.ndarray) -> tuple[float, float, float]:
    """Accepted requests per second, and their p50 and p99 in milliseconds; NaN without any."""
    _, took, at = answers[answers[:, 0] == 200].T
    if not len(took):
        return 0.0, float("nan"), float("nan")
    return len(took) / (at.max() - (at - took / 1000).min()), *np.percentile(took, [50, 99])


# --- all of it --------------------------------------------------------------------------------------------------------


def random_base(folder: Path, size: str) -> Path:
    """A model of Qwen2.5's shape with random weights, and a tokenizer trained on the headlines, as a hub would serve them."""
    import torch
    import transformers

    from loracle.data.demo import bbc_headlines

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = transformers.Qwen2Config(**SIZES[size], max_position_embeddings=32_768)
        transformers.AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    empty = transformers.Qwen2Tokenizer(eos_token="<|im_end|>")
    empty.train_new_from_iterator([headline for headline, _ in bbc_headlines()], 1000).save_pretrained(folder)
    return folder


def prepare(root: Path, size: str | None) -> tuple[Path, Path]:
    """A run of the demo's topics, and its export."""
    from loracle.data.demo import write_demo

    files, run, plain = write_demo(root / "data"), root / "topics", root / "plain"
    model = ["--model", random_base(root / "base", size)] if size else []
    steps = ["--max-steps", 2 if size else 20, "--no-baselines"]
    for command in (
        ["train", files.topics_train, "--test", files.topics_test, "-o", run, *steps, *model],
        ["export", run, "--to", "transformers", "-o", plain],
    ):
        subprocess.run([*LORACLE, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return run, plain


def overload(process: psutil.Process, seconds: float, best: float, cores: int) -> str:
    """A note on the server under ten times its best load."""
    with memory_of(process) as memory:
        answers = load(seconds, CROWD, OVERLOAD * best, cores=cores)
    statuses = answers[:, 0].astype(int).tolist()
    count = max(1, len(statuses))
    return (
        f"{CROWD} users at {OVERLOAD * best:.0f} requests/s ({OVERLOAD}×) for {seconds:g} s: {len(answers):,} answers, "
        f"{statuses.count(200) / count:.1%} accepted, p99 {figures(answers)[2]:,.0f} ms, "
        f"{statuses.count(429) / count:.1%} rejected with 429, {statuses.count(503) / count:.1%} 503, "
        f"{statuses.count(0)} broken connections; "
        f"memory {memory[0]:,.0f} MB before, {max(memory):,.0f} at most, {memory[len(memory) // 2]:,.0f} after half the time."
    )


def main(seconds: float, rounds: int, users: list[int], size: str | None, cores: int, only: list[str]) -> None:
    """Each server in turn at each number of users, several rounds; in the last one each in overload too."""
    with tempfile.TemporaryDirectory() as scratch:
        run, plain = prepare(Path(scratch), size)
        mine = [sys.executable, __file__, "--folder", plain, "--port", PORT, "--peer"]
        methods = {
            "loracle serve": [*LORACLE, "serve", run, "--port", PORT],
            "loracle serve --merge": [*LORACLE, "serve", run, "--port", PORT, "--merge"],
            "pipeline, queue in batches": [*mine, "queue"],
            "pipeline, FastAPI's threads": [*mine, "threads"],
        }
        methods = {name: command for name, command in methods.items() if not only or name in only}
        results: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        notes = []
        for last in [*[False] * (rounds - 1), True]:
            for name, command in methods.items():
                with server(on_cores(command, 0, cores)) as process:
                    load(min(3.0, seconds), 8, cores=cores)  # does what is done only once
                    for count in users:
                        figures_ = figures(load(seconds, count, cores=cores))
                        results.setdefault((name, count), []).append(figures_)
                        print(f"{name}, {count} users: {figures_[0]:.1f} texts/s, p99 {figures_[2]:.0f} ms", flush=True)
                    if last:
                        best = max(statistics.median(f[0] for f in results[name, count]) for count in users)
                        notes.append(f"{name}, {overload(process, 2 * seconds, best, cores)}")
                        print(notes[-1], flush=True)
        rows = [["server", "users", "texts/s, median", "all rounds", "p50, ms", "p99, ms"]]
        for (name, count), found in results.items():
            rate, p50, p99 = (statistics.median(values) for values in zip(*found, strict=True))
            all_rounds = ", ".join(f"{f[0]:.1f}" for f in found)
            rows.append([name, str(count), f"{rate:.1f}", all_rounds, f"{p50:.0f}", f"{p99:.0f}"])
        model = (
            f"Qwen2.5 of {size}, random weights"
            if size
            else "SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file)"
        )
        where = f"k6 on other cores than the server's {cores}" if cores else "k6 on the same cores"
        about = (
            f"{model}, {dtype_name()} on {card()}, one BBC headline a request, {where}. {rounds} rounds of {seconds:g} s in "
            "turn. Closed loop: each user sends the next request at once."
        )
    write_table("serve_load" + (f"_{size}" if size else ""), rows, [about, *notes])


def card() -> str:
    """The device of both sides."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--cores", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of servers, as the table has them")
    parser.add_argument("--peer", choices=("queue", "threads"))
    parser.add_argument("--folder")
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args()
    if given.peer:
        peer(given.folder, given.peer, given.port)
    else:
        main(given.seconds, given.rounds, given.users, given.size, given.cores, given.only)
