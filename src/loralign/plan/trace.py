"""How many bytes are live at the fullest moment of a training step: the model's own code is run on tensors that have
shapes and no storage, and every storage is counted while it lives.

The trace goes through our adapter layer, autocast, gradient checkpointing and the loss of TRL's trainers, so it follows
any Transformers model and names no architecture. A GPU is traced as a CPU with three differences: operations that
CUDA's autocast runs in fp32 do so here, the loss head holds the tiles that TRL's Triton kernels hold, and every
position is scored (TRL drops ignored ones there). A row is taken to be full, with some padding in the batch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from trl.trainer.utils import add_fused_lm_head

from loralign.carrier.abilities import task_type
from loralign.carrier.layer import as_on
from loralign.evidence import model_loss
from loralign.types import Batch, LoralignError, Loss


@dataclass(frozen=True)
class Step:
    """One optimizer step. rows: of a micro-batch. length: tokens of a row. device: whose kernels and autocast."""

    rows: int
    length: int
    micro_batches: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    """Autocast to bf16; the weights have the dtype of the model that is given."""
    gradient_checkpointing: bool = False
    total_steps: int | None = None
    """Of the whole run, where known: an outer loop has so many links."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they live. Works on real tensors too.

    there: tensors of before, which do not count.
    """

    def __init__(self, there: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._there = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._there:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def trace(model: nn.Module, step: Step, batch: Batch, loss: Loss) -> int:
    """Live bytes at the fullest moment of one micro-batch's forward and backward, weights included.

    model: on the meta device, ready to train; its tensors become fake ones. Raises LoralignError where the forward
    depends on values.
    """
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if step.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        with FakeTensorMode(allow_non_fake_inputs=True), _Grouped(), as_on(step.device), LiveBytes() as live:
            _to_fake(model)
            if step.micro_batches > 1:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.requires_grad else None
            taken = tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t, dict(batch))
            try:
                with _precision(step):
                    value = loss(model, taken)
                value.backward()
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
                name = type(error).__name__.removesuffix("Exception")
                raise LoralignError(
                    f"the forward of this model depends on the values in a batch ({name}: {_operator(error)}), so its "
                    "memory cannot be planned: measure one step instead"
                ) from error
    return live.peak


class _Grouped(TorchDispatchMode):
    """Products of fused experts in the dtype of their inputs: the kernels take fp32, their shapes bf16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        made: Tensor = func(*(t.bfloat16() for t in args[:2]), *args[2:], **(kwargs or {}))
        return made.to(args[0].dtype)


def _operator(error: Any) -> str:
    return str(getattr(error, "func", error))


def _to_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors of the same shapes; shared ones stay shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made[p] = made[p] if p in made else nn.Parameter(_like(p), p.requires_grad)
                module._parameters[name] = made[p]  # type: ignore[assignment]
        for name, b in module._buffers.items():
            if b is not None:
                made[b] = module._buffers[name] = made[b] if b in made else _like(b)


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype)


def _precision(step: Step) -> ExitStack:
    stack = ExitStack()
    if step.bf16:
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if step.device == "cuda":
            stack.enter_context(_CudaAutocast())
    return stack


_IN_FP32 = {
    torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax,
    nn.functional.layer_norm, nn.functional.group_norm, nn.functional.softmax, nn.functional.log_softmax,
    nn.functional.cross_entropy, nn.functional.nll_loss,
}  # fmt: skip
"""Operations that keep activations and that autocast runs in fp32 on CUDA, but not on the CPU."""


class _CudaAutocast(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _IN_FP32:
            args, kwargs = tree_map(_single, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _single(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def example_batch(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """A batch of the step's shape on the meta device, for models of text and of images."""
    config: Any = model.config
    main, rows = getattr(model, "main_input_name", "input_ids"), step.rows
    classes = torch.zeros(rows, dtype=torch.long, device="meta")
    if main == "pixel_values":
        size = config.image_size
        side = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.empty(rows, config.num_channels, *side, device="meta"), "labels": classes}
    if main != "input_ids":
        raise LoralignError(f"no example batch for models that take {main}: pass `batch`")
    ids = torch.zeros(rows, step.length, dtype=torch.long, device="meta")
    per_row = task_type(model) == "SEQ_CLS"
    return {"input_ids": ids, "attention_mask": ids, "labels": classes if per_row else ids}


def usual_loss(model: nn.Module, step: Step) -> Loss:
    """The loss of TRL's SFTTrainer for a causal language model (log-probabilities by tiles, no logits), else the
    model's own. Prepares the model, so call it before the adapter is put in."""
    if task_type(model) != "CAUSAL_LM":
        return model_loss
    if step.device == "cuda":
        return _tiled_loss(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def loss(adapted: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = -adapted(**batch, fused_lm_head=True).log_probs.sum()
        return value

    return loss


def _tiled_loss(base: Any) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    def loss(adapted: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        out: Tensor = _TiledHead.apply(hidden.reshape(-1, hidden.shape[-1]), base.get_output_embeddings().weight)
        return out.sum()

    return loss


class _TiledHead(torch.autograd.Function):
    """What `trl.kernels.chunked_logprob` allocates on a GPU: one tile of logits in each direction, fp32 dL/dhidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        _tile(hidden, weight, ctx.dtype)
        return torch.zeros(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        hidden, weight = ctx.saved_tensors
        total = torch.zeros_like(hidden, dtype=torch.float32)
        _tile(hidden, weight, ctx.dtype)
        return total.to(hidden.dtype), None


_TILE = (4096, 32768)
"""TOKEN_CHUNK_SIZE and _CHUNKED_LOGPROB_CHUNK_SIZE of TRL 1.16: tokens and vocabulary entries of one tile."""


def _tile(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tile = torch.empty(min(hidden.shape[0], _TILE[0]), _TILE[1], dtype=dtype)
    return tile, hidden[: _TILE[0]].to(dtype), weight[: _TILE[1]].to(dtype)
