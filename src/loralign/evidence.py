"""Evidence: what an init may know before training, collected once and cached.

An Init states *what* it needs (`TopGradient`, `Activations`, …); this file knows *how* to get it. The exact gradient:
a tap on every adapted layer hands over its input x and the gradient δ of its output, G += δᵀ·x is formed for one layer
at a time, and the sums are kept in fp32 on the CPU; no weight ever requires grad. This is right with accumulation,
both kinds of gradient checkpointing, a module used twice in a forward, the first block (whose input needs no gradient)
and quantised bases. G is the mean over micro-batches of each one's mean-loss gradient, and over ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loralign.layer import tap
from loralign.linalg import keyed_generator, top_svd
from loralign.types import Batch, Batches, Directions, LoralignError, Loss, Nothing, Site, TopGradient, WorkFailed

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
Sink = Callable[[Site, Tensor, Tensor], None]
"""Called with (site, δ (T, d_out), x (T, d_in)) once per use of the module and micro-batch."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that Transformers models return."""
    loss: Tensor = model(**batch).loss
    return loss


@contextmanager
def tapped(sites: Sequence[Site], sink: Sink) -> Iterator[None]:
    """Within: every backward through the model calls `sink` for each adapted layer."""
    anchors: dict[torch.device, Tensor] = {}
    handles = []

    def hook(site: Site) -> Callable[..., Tensor]:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            anchor = anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
            deliver = lambda g, x: sink(site, g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))
            return tap(output, args[0], anchor, deliver)

        return forward_hook

    for site in sites:
        handles.append(site.layer.register_forward_hook(hook(site)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_all(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], loss: Loss, sink: Sink, progress: Progress | None
) -> None:
    """One forward and backward per micro-batch with the taps in place; leaves no gradients behind."""
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with tapped(sites, sink):
            for i, batch in enumerate(batches):
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                value = loss(model, moved)
                if not torch.isfinite(value):
                    raise WorkFailed(f"the loss of evidence micro-batch {i} is {value.item()}: look for broken rows")
                value.backward()  # type: ignore[no-untyped-call]
                if progress:
                    progress("gradient", i + 1, len(batches))
    finally:
        for p in trained:
            p.requires_grad_(True)
            p.grad = None


def exact_gradient(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], loss: Loss, progress: Progress | None = None
) -> dict[str, Tensor]:
    """G (d_out, d_in) of every site, fp32 on the CPU, averaged over micro-batches and ranks."""
    total = {site.name: torch.zeros(site.d_out, site.d_in) for site in sites}

    def sink(site: Site, delta: Tensor, x: Tensor) -> None:
        if delta.is_cuda and delta.dtype != torch.float32:
            G = torch.mm(delta.T, x.to(delta.dtype), out_dtype=torch.float32)
        else:
            G = delta.float().T @ x.float()
        total[site.name].add_(G.cpu())

    backward_all(model, sites, batches, loss, sink, progress)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for G in total.values():
        if ranks > 1:
            dist.all_reduce(G)
        G.div_(len(batches) * ranks)
    return total


def top_gradient(
    need: TopGradient,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    loss: Loss,
    seed: int,
    progress: Progress | None,
) -> dict[str, Directions]:
    """The leading per_rank·r singular triples of every site's exact gradient."""
    gradients, found = exact_gradient(model, sites, batches, loss, progress), {}
    device = next(model.parameters()).device
    for i, site in enumerate(sites):
        G = gradients.pop(site.name).to(device)
        k = min(need.per_rank * site.r, *G.shape)
        U, S, V = top_svd(G, k, niter=4, generator=keyed_generator(seed, "gradient svd", 0, site.name))
        square = float(G.square().sum())
        share = float(S.square().sum()) / square if square > 0 else None
        found[site.name] = Directions(U.cpu(), S.cpu(), V.cpu(), captured=share)
        if progress:
            progress("svd", i + 1, len(sites))
    return found


def collect(
    need: Any,
    model: nn.Module,
    sites: Sequence[Site],
    batches: Batches | None,
    *,
    loss: Loss = model_loss,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Directions]:
    """What `need` asks for, per site; {} for `Nothing`. Computed once on every rank alike, or read from `cache`."""
    if isinstance(need, Nothing):
        return {}
    collectors: dict[type, Callable[..., dict[str, Directions]]] = {TopGradient: top_gradient}
    if type(need) not in collectors:
        raise LoralignError(f"no evidence collector for {type(need).__name__}")
    taken = list(islice(batches or (), need.micro_batches))
    if not taken:
        raise LoralignError("the init needs gradients, so it needs data: pass `batches`")
    key = evidence_key(need, model, sites, taken, seed) if cache else ""
    path = cache / f"evidence-{key}.safetensors" if cache else None
    if path is not None and path.exists():
        return load_evidence(path)
    found = collectors[type(need)](need, model, sites, taken, loss, seed, progress)
    if path is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        save_evidence(path, found)
    return found


# ---------------------------------------------------------------------------------------------------------------- cache


def evidence_key(need: Any, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], seed: int) -> str:
    """Content hash of settings, model (config and a strided sample of every adapted weight) and data."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((need, seed, [(s.name, s.r, s.d_out, s.d_in) for s in sites])).encode())
    for site in sites:
        flat = site.layer.get_base_layer().weight.detach().reshape(-1)  # type: ignore[operator]
        sample = flat[:: max(1, flat.numel() // 1024)]
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for batch in batches:
        for name, value in sorted(batch.items()):
            raw = (
                value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if isinstance(value, Tensor)
                else repr(value).encode()
            )
            digest.update(name.encode() + raw)
    return digest.hexdigest()


def save_evidence(path: Path, found: dict[str, Directions]) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, facts = {}, {}
    for name, d in found.items():
        tensors.update(
            {f"{name}|{k}": v.contiguous() for k, v in (("U", d.U), ("S", d.S), ("V", d.V)) if v is not None}
        )
        facts[name] = [d.captured, d.exact, d.note]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
    temporary.replace(path)


def load_evidence(path: Path) -> dict[str, Directions]:
    with safe_open(path, framework="pt") as f:
        facts = json.loads(f.metadata()["facts"])
        keys = set(f.keys())
        get = lambda key: f.get_tensor(key) if key in keys else None
        return {n: Directions(get(f"{n}|U"), f.get_tensor(f"{n}|S"), get(f"{n}|V"), *facts[n]) for n in facts}
