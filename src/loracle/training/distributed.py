"""Several processes on one training, as ``torchrun`` and ``accelerate launch`` start them; alone, all of this does nothing.

Each process holds the whole model and takes its share of every batch. What they exchange, they exchange once a step: the sums
of losses and counts, and the sums of the gradients. torch's DistributedDataParallel is not used: it wants as many backward
passes in one process as in the next, averages what has to be summed, and falters over weights without a gradient; a batch cut
by tokens, or smaller than the number of processes, has all of these.

A base too large for one GPU is cut into pieces, a part of every frozen layer in each process (FSDP2), while what is trained
stays whole everywhere and is summed as ever. Nobody can then run a layer alone: in a step all take as many rounds, and
whatever the main process computes by itself the others compute along (``on_main``).

An error needs no word to the others: the process ends, and the launcher ends them.
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

PATIENCE = datetime.timedelta(hours=12)  # while one process reads, scores or reports, the others wait
BUCKET = 2**24  # numbers that are summed at a time, 64 MB: next to no time is lost between buckets, and little memory
REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}

T = TypeVar("T")


def start(device: torch.device) -> PartialState:
    """Join the other processes, if there are any, and say which one this is; on GPUs each takes its own.

    Raises:
        UserError: the launcher asks for a model that is cut into pieces its own way, or one GPU is asked for in all processes.
    """
    if cut := [name for variable, name in REFUSED.items() if os.environ.get(variable, "").lower() == "true"]:
        raise UserError(
            "processes that cut no model by themselves",
            f"{cut[0]} in Accelerate's settings",
            "start them with torchrun or `accelerate launch --multi_gpu`; a base too large for one GPU: --shard",
        )
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if state.num_processes > 1 and device.index not in (None, state.device.index):
        raise UserError("a GPU for each process", f"--device {device} for all", f"pass --device {device.type}")
    return state


def log_on_main(log: Callable[[str], None], device: torch.device) -> Callable[[str], None]:
    """``log`` in the main process, and a function that prints nothing in the others. A run on ``device`` calls this first."""
    return log if start(device).is_main_process else lambda line: None


def shard(scorer: Scorer, device: torch.device) -> None:
    """Cut the frozen weights of every layer into as many parts as there are processes, and move the model to ``device``.

    What is trained stays whole. The scorer comes in the CPU's memory, through which each process has read the base.

    Raises:
        UserError: there is one process, or the model is no decoder that can be packed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    state = PartialState()
    if state.num_processes == 1:
        raise UserError("several processes for --shard", "one", "start them with torchrun, or leave out --shard")
    if scorer.encoder or not scorer.packed:
        raise UserError("a decoder for --shard", scorer.inner.config.model_type, "leave out --shard")
    mesh = init_device_mesh(device.type, (state.num_processes,))
    trained = {p for p in scorer.parameters() if p.requires_grad}
    for layer in scorer.inner.base_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    scorer.to(state.device)
    scorer.sharded = True


def on_main(function: Callable[[], T], along: Scorer | None = None) -> T:
    """What ``function`` gives in the main process, in all of them.

    Args:
        along: a scorer that ``function`` uses. Where it is sharded, the other processes compute along with the main one.

    Raises:
        UserError: in the others, where the main one raised something.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    if state.is_main_process:
        held: list[Any] = [None, "failed"]
        together = along is not None and along.sharded
        if along is not None and together:
            along.announce = lambda *asked: broadcast_object_list([asked, "compute"])
        try:
            held = [function(), "done"]
        except (RuntimeError, MemoryError) as e:
            if together and out_of_memory(
                e
            ):  # the others wait in the midst of a layer, where nothing can be told to them
                held = []
                raise UserError(
                    "memory to score with a sharded base",
                    "too little",
                    "pass a smaller --max-length",
                ) from e
            raise
        finally:
            if along is not None:
                along.announce = None
            if held:
                broadcast_object_list(held)
        return held[0]
    while True:
        value, said = broadcast_object_list([None, None])
        if said == "failed":
            raise UserError("the main process to go on", "an error in it", "do what it says")
        if said == "done":
            return value
        assert along is not None
        with torch.no_grad():
            along.states(*value)


def most(number: int) -> int:
    """The largest number that any process has."""
    return max(gathered([number]))


def gathered(values: list[T]) -> list[T]:
    """The lists of all processes as one, in their order."""
    return gather_object(values)


def partition(examples: Sequence[Example], processes: int) -> list[list[int]]:
    """Which of the examples each process takes, about as many letters each: the longest first, to whoever has least."""
    parts: list[list[int]] = [[] for _ in range(processes)]
    loads, sizes = [0] * processes, [_letters(e) for e in examples]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += sizes[i]
    return [sorted(part) for part in parts]


def summed(values: Sequence[float]) -> list[float]:
    """A few numbers, each summed over the processes."""
    state = PartialState()
    if state.num_processes == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def sum_gradients(parameters: Sequence[Tensor], known: Sequence[bool]) -> None:
    """Sum the gradients of ``parameters`` over the processes; ``known``: whether any of them has one."""
    present = [p for p, has in zip(parameters, known, strict=True) if has]
    for p in present:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in present if p.grad is not None]):
        flat = torch.cat([g.flatten() for g in bucket])
        torch.distributed.all_reduce(flat)
        for g, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(total.view_as(g))


def broadcast_parameters(parameters: Sequence[Tensor]) -> None:
    """Give every process the main one's weights: what is drawn or computed alike need not be alike to the last bit."""
    if PartialState().num_processes > 1:
        for p in parameters:
            torch.distributed.broadcast(p.detach(), src=0)


def _letters(example: Example) -> int:
    return sum(map(len, texts_of(example))) + len(example.context or "")


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(t.numel() for t in held) + tensor.numel() > BUCKET:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held
