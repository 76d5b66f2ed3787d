"""Score the windows of a job with a pool of Ray actors. The only module that imports ray.

One task on this node reads the table, one window a block. Each actor has a ``Predictor``. Results come back in order.
So only this node needs the data, and every node needs the run folder and the base model. Windows and scores equal those
without Ray.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loracle.errors import UserError
from loracle.runs.predictor import Predictor, score_window

if TYPE_CHECKING:
    from loracle.runs.batch import Job


def score_windows(job: Job, first: int) -> Iterator[np.ndarray]:
    """Values of each window of the job from the ``first`` on, as ``Job.values`` yields them.

    Raises:
        UserError: Ray is not installed, the cluster is too small, or a worker fails.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # byte: one window a block, since an actor takes a block
    try:
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        windows = ray.data.read_datasource(
            _windows_source(job, first), override_num_blocks=1, num_cpus=0, label_selector=here
        )
        scored = windows.map_batches(
            _Worker,
            fn_constructor_args=(str(job.run.resolve()), job.base, job.device),
            batch_size=1,
            **_pool(ray, job.workers or 0, job.device),
        )
        for index, row in enumerate(scored.iter_rows(), first):
            if row["window"] != index:
                raise RuntimeError(f"window {row['window']} came back in place of {index}")
            yield np.frombuffer(row["values"]).reshape(row["shape"])
    except ray.exceptions.RayError as error:
        reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        raise UserError(
            f"A Ray worker failed: {reason.rstrip('.')}.", "Check that run and base model are on every node."
        ) from error
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """A predictor in an actor."""

    def __init__(self, run: str, base: str | None, device: str):
        self.predictor = Predictor(run, base=base, device=device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (window,) = batch["texts"]
        values = score_window(self.predictor, *json.loads(window))
        packed = np.array([values.tobytes()], dtype=object)
        return {"window": batch["window"], "values": packed, "shape": np.array([values.shape])}


def _windows_source(job: Job, first: int) -> Any:
    """A data source of one Ray task, which yields the windows lazily."""
    import pyarrow
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read() -> Iterator[Any]:
        for index, window in enumerate(itertools.islice(job.windows(), first, None), first):
            texts = json.dumps([[text for *_, text, _ in window], [context for *_, context in window]])
            yield pyarrow.table({"window": [index], "texts": [texts]})

    class Windows(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))]

    return Windows()


def _pool(ray: Any, workers: int, device: str) -> dict[str, Any]:
    """Size of the pool and resources of each worker: a GPU where the cluster has some, else its share of the processors."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if device in ("auto", "cuda") else 0
    cpus = int(resources.get("CPU", 1))
    workers = workers or gpus or len(ray.nodes())
    if workers > (gpus or cpus):
        available = f"{gpus} GPUs" if gpus else f"{cpus} processors"
        raise UserError(f"--workers {workers} is more than the cluster has ({available}).", "Ask for fewer workers.")
    share = {"num_gpus": 1} if gpus else {"num_cpus": cpus // workers}
    return {"compute": ray.data.ActorPoolStrategy(size=workers), **share}


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # hides its messages for developers
    warnings.filterwarnings("ignore", module=r"ray\.")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"--on ray needs {error.name}, which is not installed.", "Run: pip install 'loracle[ray]'"
        ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
