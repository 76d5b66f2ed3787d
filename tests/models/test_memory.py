"""What a training takes is foreseen within a factor, and running out of memory makes rounds smaller, not results other."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import small
import torch
from small import facts

from loracle.errors import UserError
from loracle.models import memory, scoring
from loracle.tasks import Task
from loracle.text.tokenize import Encoded

TASK = Task(name="single_label", label_names=("a", "b", "c"))
CPU = torch.device("cpu")
TEXTS = [Encoded(chunks=(tuple(range(3, 3 + n)),), starts=(0,)) for n in (5, 9, 30, 7, 12, 4, 21, 8)]


def scorer(folder, **lora):
    return small.new_scorer(
        folder,
        TASK,
        pad_token_id=1,
        dtype=torch.float32,
        device=CPU,
        lora={"r": 4, "alpha": 8.0, "dropout": 0.0} | lora,
    )


def short_of(made, tokens: int):
    """A forward that has memory for so many tokens."""
    own, seen = made.forward, []

    def forward(batch):
        seen.append(batch.tokens)
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(batch)

    return forward, seen


def test_out_of_memory_halves_scoring_batches(tiny_model):
    made = scorer(tiny_model("qwen2"))
    wanted = scoring.score(made, TEXTS)
    forward, seen = short_of(made, 40)
    found = scoring.in_micro_batches(made, forward, TEXTS)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert max(seen) == sum(t.tokens for t in TEXTS)
    assert sum(n > 40 for n in seen) <= 2  # once it is known, no round fails again
    forward, _ = short_of(made, 20)
    with pytest.raises(UserError, match=facts("memory")):  # one text alone does not fit
        scoring.in_micro_batches(made, forward, TEXTS)


def test_sharded_model_raises_out_of_memory(tiny_model):
    """The other processes wait in the midst of a layer."""
    made = scorer(tiny_model("qwen2"))
    made.sharded = True
    forward, seen = short_of(made, 40)
    with pytest.raises(torch.OutOfMemoryError):
        scoring.in_micro_batches(made, forward, TEXTS)
    assert len(seen) == 1


@pytest.mark.slow
def test_failed_forward_frees_its_graph(tiny_model):
    """q has asked for what k and v read too, and then k fails: the graph below must not wait for them."""
    made = scorer(tiny_model("qwen2")).train()
    attention = made.inner.base_model.layers[-1].self_attn
    states = []
    attention.q_proj.register_forward_pre_hook(lambda _, x: states.append(weakref.ref(x[0])))
    failing = attention.k_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        made(made.pack(TEXTS))
    assert attention.q_proj.group.outputs
    memory.release(made)
    gc.collect()
    assert states[0]() is None
    failing.remove()
    made(made.pack(TEXTS)).sum().backward()
    assert not attention.q_proj.group.outputs


def test_other_runtime_errors_are_raised(tiny_model):
    def broken(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        scoring.in_micro_batches(scorer(tiny_model("qwen2")), broken, TEXTS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_cpu_allocator_error_is_recognised():
    code = (
        "import resource, torch\n"
        "from loracle.models.memory import out_of_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        "try:\n    torch.empty(2**37, dtype=torch.uint8)\n"
        "except RuntimeError as e:\n    print(out_of_memory(e))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "bert"])
def test_activation_estimate_matches_autograd(tiny_model, kind):
    """Against what autograd really keeps, counted once for each piece of memory that is no weight."""
    made = scorer(tiny_model(kind)).train()
    batch, kept = made.pack(TEXTS), {}
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage()
        if place.data_ptr() not in weights:
            kept[place.data_ptr()] = place.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(batch).sum()
    foreseen = memory.training_need(made).per_token * batch.tokens
    assert 0.5 < sum(kept.values()) / foreseen < 2


def test_flops_per_token(tiny_model):
    made = scorer(tiny_model("qwen2"))
    weights = sum(p.numel() for n, p in made.inner.base_model.named_parameters() if n.endswith("base_layer.weight"))
    adapters = sum(p.numel() for n, p in made.named_parameters() if "lora_" in n)
    assert memory.training_need(made).flops_per_token == 4 * weights + 6 * adapters
    top = scorer(tiny_model("qwen2"), adapt_top=1)
    adapters = sum(p.numel() for n, p in top.named_parameters() if "lora_" in n)
    share = 1 / top.inner.config.num_hidden_layers
    assert memory.training_need(top, 1).flops_per_token == pytest.approx(
        2 * (weights + adapters) * (1 + share) + 2 * adapters
    )


def test_weight_bytes_of_a_folder(tiny_model):
    folder = tiny_model("qwen2")
    model = scorer(folder).inner.base_model
    numbers = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert memory.weight_bytes(folder, torch.bfloat16) == pytest.approx(2 * numbers, rel=0.5)
    assert memory.weight_bytes(folder, torch.float32) == 2 * memory.weight_bytes(folder, torch.bfloat16)


@pytest.mark.parametrize("version", [1, 2])
def test_container_memory_limit(tmp_path, version):
    """Pages of files that the kernel can take back do not."""
    folder, own = tmp_path / "memory" if version == 1 else tmp_path, tmp_path / "cgroup"
    own.write_text("4:memory:/box\n3:cpu:/\n" if version == 1 else "0::/box\n")
    assert memory.left_in_container(tmp_path, own) > 1e18
    (folder / "box").mkdir(parents=True)
    limit, used, files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    for name, content in ((limit, "1000"), (used, "700"), ("memory.stat", f"anon 600\n{files} 50")):
        (folder / "box" / name).write_text(f"{content}\n")
    assert memory.left_in_container(tmp_path, own) == 350
    (folder / "box" / limit).write_text("max\n")
    assert memory.left_in_container(tmp_path, own) > 1e18


def test_training_rate_leaves_no_trace(tiny_model):
    made = scorer(tiny_model("qwen2"), adapt_top=1).train()
    lower = made.lower = object()
    assert 1 < memory.training_rate(made, made.pack(TEXTS)) < 1e9
    assert made.lower is lower
    assert all(p.grad is None for p in made.parameters())


def test_matrix_rate_is_plausible(tiny_model):
    assert 1e7 < memory.matrix_rate(scorer(tiny_model("qwen2")), 0.01) < 1e15
    assert memory.free_memory(CPU) > 0
