"""Training in several processes, as ``torchrun`` and ``accelerate launch`` start them. With one process it does nothing.

Each process holds the whole model and takes a part of every batch. Once a step they sum losses, counts and gradients.
torch's DistributedDataParallel does not fit: it needs equally many backward passes in each process, averages instead of
summing, and fails on weights without a gradient. Batches cut by tokens, or smaller than the number of processes, have all
three.

A base too large for one GPU is sharded (FSDP2): each process holds a part of every frozen layer. Trained weights stay whole
and are summed as before. No process can then run a layer alone. So all take equally many micro-batches, and the others
compute along with the main process (``on_main``).

Errors are not broadcast: the process ends, and the launcher stops the others.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from loracle.errors import UserError
from loracle.examples import Example, texts_of
from loracle.models.memory import out_of_memory

if TYPE_CHECKING:
    from loracle.models.scorer import Scorer

TIMEOUT = datetime.timedelta(hours=12)  # the others wait while the main process reads, scores or reports
BUCKET = 2**24  # numbers summed at a time (64 MB): little time is lost between buckets, and little memory is used
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}

T = TypeVar("T")


def start(device: torch.device) -> PartialState:
    """Join the other processes, if there are any; on GPUs each process takes its own.

    Raises:
        UserError: Accelerate is set to shard models, or all processes would use one GPU.
    """
    if names := [name for variable, name in UNSUPPORTED.items() if os.environ.get(variable, "").lower() == "true"]:
        raise UserError(
            f"Accelerate is set to use {names[0]}, which loracle does not support.",
            "Start with torchrun or `accelerate launch --multi_gpu`. For a base too large for one GPU add --shard.",
        )
    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if state.num_processes > 1 and device.index not in (None, state.device.index):
        raise UserError(f"--device {device} puts all processes on one GPU.", f"Pass --device {device.type}.")
    return state


def log_on_main(log: Callable[[str], None], device: torch.device) -> Callable[[str], None]:
    """Return ``log`` in the main process, and a function that does nothing in the others. Call it first in a run."""
    return log if start(device).is_main_process else lambda line: None


def shard(scorer: Scorer, device: torch.device) -> None:
    """Shard the frozen weights of every layer over the processes and move the model to ``device``.

    Trained weights stay whole. The scorer arrives in CPU memory, where each process has read the base.

    Raises:
        UserError: there is one process, or the model is not a packable decoder.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    state = PartialState()
    if state.num_processes == 1:
        raise UserError(
            "--shard needs several processes, and there is one.", "Start them with torchrun, or leave out --shard."
        )
    if scorer.encoder or not scorer.packed:
        name = scorer.inner.config.model_type
        raise UserError(f"--shard needs a packable decoder; {name} is not one.", "Leave out --shard.")
    mesh = init_device_mesh(device.type, (state.num_processes,))
    trained = {p for p in scorer.parameters() if p.requires_grad}
    for layer in scorer.inner.base_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    scorer.to(state.device)
    scorer.sharded = True


def on_main(function: Callable[[], T], along: Scorer | None = None) -> T:
    """Call ``function`` in the main process and return its result in all of them.

    Args:
        along: a scorer that ``function`` uses. Where it is sharded, the other processes compute along with the main one.

    Raises:
        UserError: in the others, when the main process raised an exception.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    return _call_and_broadcast(function, along) if state.is_main_process else _follow_main(along)


# Messages of the main process to the others are lists of two: [value, "done"], [None, "failed"] or, to compute along,
# [arguments of Scorer.states, "compute"].


def _call_and_broadcast(function: Callable[[], T], along: Scorer | None) -> T:
    """The main process's side of ``on_main``."""
    sharded = along is not None and along.sharded
    if along is not None and sharded:
        along.announce = lambda *arguments: broadcast_object_list([arguments, "compute"])
    try:
        result = function()
    except BaseException as e:
        if sharded and isinstance(e, (RuntimeError, MemoryError)) and out_of_memory(e):
            # The others wait inside a layer, where no message reaches them.
            raise UserError("Out of memory while scoring with a sharded base.", "Pass a smaller --max-length.") from e
        broadcast_object_list([None, "failed"])
        raise
    finally:
        if along is not None:
            along.announce = None
    broadcast_object_list([result, "done"])
    return result


def _follow_main(along: Scorer | None) -> Any:
    """The other processes' side of ``on_main``: compute along until the main process is done."""
    while True:
        value, status = broadcast_object_list([None, None])
        if status == "failed":
            raise UserError("The main process failed.", "See its error message.")
        if status == "done":
            return value
        assert along is not None
        with torch.no_grad():
            along.states(*value)


def all_gather(values: list[T]) -> list[T]:
    """Concatenate the lists of all processes, in their order."""
    return gather_object(values)


def all_reduce_max(number: int) -> int:
    """The largest number of any process."""
    return max(all_gather([number]))


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum each of a few numbers over the processes."""
    state = PartialState()
    if state.num_processes == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def partition(examples: Sequence[Example], processes: int) -> list[list[int]]:
    """Indices of the examples for each process, balanced by characters: longest first, each to the lightest process."""
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads, sizes = [0] * processes, [_characters(e) for e in examples]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        parts[lightest].append(i)
        loads[lightest] += sizes[i]
    return [sorted(part) for part in parts]


def sum_gradients(parameters: Sequence[Tensor], has_gradient: Sequence[bool]) -> None:
    """Sum the gradients of ``parameters`` over the processes; ``has_gradient`` is True where any process has one."""
    if PartialState().num_processes == 1:
        return
    present = [p for p, has in zip(parameters, has_gradient, strict=True) if has]
    for p in present:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in present if p.grad is not None]):
        flat = torch.cat([g.flatten() for g in bucket])
        torch.distributed.all_reduce(flat)
        for g, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(total.view_as(g))


def broadcast_parameters(parameters: Sequence[Tensor]) -> None:
    """Copy the main process's weights to all: equal seeds and code do not guarantee equal bits."""
    if PartialState().num_processes > 1:
        for p in parameters:
            torch.distributed.broadcast(p.detach(), src=0)


def _characters(example: Example) -> int:
    return sum(map(len, texts_of(example))) + len(example.context or "")


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
