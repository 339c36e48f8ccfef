"""The blocks of a GPU model, compiled: traces are kept with the code of a block, adapters come and go.

    loralign.compile(model)          # a loop of one's own, before the first step; `attach(…, compile="auto")`, recipes

torch.compile guards on structure and not on the identity of modules, so all blocks of a kind run one piece of code, and
a fresh adapter of a known kind runs what an earlier one made. Shapes of batches are static: with dynamic ones the
numbers would depend on which shapes came before; ranks that differ between blocks are left open (`ragged.py`). The
first call of each kind (by a block's modules and the arguments it gets) is a trial: one block, forward and backward,
its output beside the untouched block's. What it raises, a graph that breaks, and shapes without end leave the model as
it was, and one line says why. Evaluation and generation run as they are.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils.output_capturing import _active_collector

from loralign.carrier.ragged import OPEN, leave_ranks_open
from loralign.carrier.siblings import apart, share_inputs
from loralign.data.read import first_line
from loralign.evidence.inputs import sums_in
from loralign.maths.given import checked

log = logging.getLogger("loralign")
NOT = "the model's blocks are not compiled, since %s"
STORM = 32
"""Variants of a block in one run: four lengths, whole batches and the last one of an epoch, the first block and the
others, before and after a rule changed something. More of them cost more than they bring."""
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By how much, of its norm, a compiled block's output may differ; in half precisions 0.03."""

EXPLAINED = "Explanation: "
"""How dynamo begins the line that names what it does not know."""

Structure = tuple[tuple[str, type[nn.Module], frozenset[tuple[str, bool]]], ...]
Given = tuple[tuple[bool, ...], frozenset[str]]


def named_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers that a Transformers model names; none where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


@checked
def compile(model: nn.Module, *, backend: str | None = None) -> Blocks:
    """Compile the blocks of an adapted model for training, where that works; say why where it doesn't.

    Call it after `adapt` or `attach` and before the first step; batches should have few shapes, since each one is
    compiled by itself.

    Args:
        backend: of torch.compile; None: "inductor" on a GPU and nothing on a CPU.
    Returns:
        the blocks: `why` tells what speaks against them, "" where nothing does; `restore()` gives the model back.
    Example:
        >>> import loralign, torch; from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> recipe = loralign.build("lora", r=2)
        >>> model = loralign.adapt(LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)), recipe).train()
        >>> blocks = loralign.compile(model, backend="eager")        # on a GPU: loralign.compile(model)
        >>> opt = loralign.optimizer(model, recipe, lr=1e-3); ids = torch.ones(1, 4, dtype=torch.long)
        >>> model(input_ids=ids, labels=ids).loss.backward(); opt.step(); blocks.why
        ''
    """
    made = Blocks(model, backend or "inductor")
    if backend is None and next(model.parameters()).device.type != "cuda":
        made.why = "there is no GPU"
    elif why := made.unfit():
        made.stop(why)
    else:
        made.start()
    return made


class Until(TrainerCallback):
    """Compiled while a Trainer trains: what comes after it, such as an export, finds the model as it was."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.made:
            one.restore()


def no_compiler(device: str) -> str:
    """Why nothing can be compiled for a device, "" where something may be."""
    if device == "cuda" and not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return "there is no C compiler, which Triton needs: install gcc or set CC"
    return ""


class Blocks:
    """The compiled blocks of one model, of the kinds in which something trains, until something speaks against them."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        named = named_blocks(model)
        kinds = {type(b) for b in named if any(p.requires_grad for p in b.parameters())}
        self.blocks = [b for b in named if type(b) in kinds]
        self.why = ""
        """Why they run as they are; "" while they run compiled."""
        self.tried: set[tuple[int, Given]] = set()
        """Kinds of calls that had their trial: a structure's number, and the arguments."""
        self.told: set[str] = set()
        """Reasons for which calls run as they are, said once."""

    def unfit(self) -> str:
        """Why they cannot be compiled, as far as that is known without trying; else ""."""
        if split := self._split():  # which renames the kinds of blocks
            return split
        if not self.blocks:
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            what = "trains nothing in its blocks" if named_blocks(self.model) else "does not name its blocks"
            return f"{type(base).__name__} {what}"
        return no_compiler(next(self.model.parameters()).device.type)

    def start(self) -> None:
        """From the next call on."""
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, STORM)
        for setting, value in OPEN.items():  # for this process, as calls are compiled whenever they come
            setattr(config, setting, value)
        leave_ranks_open(self.blocks)
        numbers: dict[Structure, int] = {}
        for block in self.blocks:
            number = numbers.setdefault(structure(block), len(numbers))
            run = torch.compile(block._call_impl, dynamic=False, fullgraph=True, backend=self.backend)
            block._compiled_call_impl = partial(self._call, block, run, number)

    def stop(self, why: str) -> None:
        """Run as they are from now on, and say why."""
        self.why = why
        log.warning(NOT, why)

    def restore(self) -> None:
        """Leave the model as it was before."""
        apart(self.blocks)
        for block in self.blocks:
            block._compiled_call_impl = None

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _call(self, block: nn.Module, run: Callable[..., Any], number: int, /, *args: Any, **kwargs: Any) -> Any:
        """One block's call; `block.training` is what a Trainer sets for its own steps alone."""
        if self.why or not block.training or self._keeps(kwargs):
            return block._call_impl(*args, **kwargs)
        kind = number, given(args, kwargs)
        if kind not in self.tried and torch.is_grad_enabled():
            if _recording():  # a trial would fail there, which is no fault of compiling
                raise RuntimeError("a block gets arguments of another kind than before")
            self.tried.add(kind)
            if why := self._split() or self._trial(block, run, args, kwargs):
                self.stop(why)
                return block._call_impl(*args, **kwargs)
        try:
            return run(*args, **kwargs)
        except FailOnRecompileLimitHit:
            self.stop(f"they were compiled {STORM} times: give batches of few shapes (`data.packing: true`)")
        except TorchDynamoException as error:
            self.stop(why_not(error))
        return block._call_impl(*args, **kwargs)

    def _split(self) -> str:
        """A trainer splits them after the blocks were made, so the first call asks as well."""
        split = any(isinstance(p, DTensor) for p in self.model.parameters())
        return "its parameters are split over processes" if split else ""

    def _keeps(self, kwargs: dict[str, Any]) -> bool:
        """Whether the call leaves more than its output: keys and values, whose lengths have no end, or what hooks of
        Transformers collect (hidden states, attentions, routers), which compiled code would not."""
        cached = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))  # as versions name them
        collected = sorted(_active_collector.get() or ())
        why = "it keeps keys and values: pass use_cache=False" if cached else ""
        if collected:
            why = f"it collects {', '.join(name for name in collected if name[0] != '_')}"
        if why and why not in self.told and torch.is_grad_enabled():
            self.told.add(why)
            log.warning("the model's blocks run as they are while %s", why)
        return bool(why)

    def _trial(self, block: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> str:
        """Why a block cannot run compiled, "" where it can. Weights, buffers, gradients, generators and sums stay."""
        kept = [(b, b.clone()) for b in (*block.buffers(), *sums_in(block))]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:  # within hooks of its own: activation checkpointing counts what the trial would keep for backward
            with torch.random.fork_rng(devices), saved_tensors_hooks(_as_is, _as_is):
                # only blocks of one kind take the same arguments
                share_inputs(block, self.blocks, lambda: block._call_impl(*args, **kwargs))
                own = tuple(a.detach().requires_grad_(a.requires_grad) if _is_float(a) else a for a in args)
                y = first(run(*own, **kwargs))
                trained = [t for t in (*own, *block.parameters()) if isinstance(t, Tensor) and t.requires_grad]
                if trained:
                    torch.autograd.grad(y, trained, torch.zeros_like(y), allow_unused=True)
                with torch.no_grad():
                    states = _generators()
                    plain = first(block._call_impl(*args, **kwargs))
                    draws = not all(map(torch.equal, states, _generators()))  # compiled code draws other numbers
                    return "" if draws else _apart(y.detach(), plain)
        except Exception as error:  # whatever it is: the untouched block runs next, and raises what is its own
            return why_not(error)
        finally:
            with torch.no_grad():
                for b, before in kept:
                    b.copy_(before)


def _recording() -> bool:
    """Whether calls become a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def first(y: Any) -> Tensor:
    """A block's hidden states."""
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def why_not(error: BaseException) -> str:
    """What a failed compilation says, dynamo's explanation with it, without the pages after it."""
    cause = getattr(error, "inner_exception", None) or error
    lines = (line.strip() for line in str(cause).splitlines())
    more = next((f" ({line.removeprefix(EXPLAINED)})" for line in lines if line.startswith(EXPLAINED)), "")
    return f"{type(cause).__name__}: {first_line(cause)}{more}"[:240]


def _as_is(t: Tensor) -> Tensor:
    return t


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def structure(block: nn.Module) -> Structure:
    """Names and types of a block and the modules in it, with what each says of itself by yes or no, as decoders do."""

    def said(m: nn.Module) -> frozenset[tuple[str, bool]]:
        return frozenset((k, v) for k, v in vars(m).items() if isinstance(v, bool) and k != "training")

    return tuple((name, type(m), said(m)) for name, m in block.named_modules())


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Which arguments a call has that are not None."""
    return tuple(a is not None for a in args), frozenset(k for k, v in kwargs.items() if v is not None)


def _generators() -> list[Tensor]:
    """States of what dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _apart(y: Tensor, plain: Tensor) -> str:
    off = float((y.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-30))
    return "" if off <= ROUNDING.get(y.dtype, 0.03) else f"a compiled block's output differs by {off:.1e} of its norm"
