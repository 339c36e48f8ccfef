"""Probes: a few stored inputs and the logits that the training process got for them, so that anyone can check a copy.

    inputs     from the caller's batch, or drawn; 2 rows, at most 32 positions, no padding
    logits     of the trained model: evaluation mode, outside autocast, fp32; the last positions, at most 4 MB
    expected   of the exported factors, computed here; only where they differ from the trained ones (rounding,
               truncation, merging, a form without an exact fold)
    base       of the model without the update; only where the tolerance is no fine measure of what the update does

Half-precision weights are widened to fp32 for the computation, which is exact, and put back after it. Where memory does
not allow that, the model's own precision is used and said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from loralign.carrier.abilities import fresh_heads, text_config
from loralign.carrier.layer import first_input
from loralign.carrier.packed import has_kernels, is_quantised, while_loaded
from loralign.carrier.quantise import as_data
from loralign.carrier.stored import digest
from loralign.io.folder import ADAPTER_CONFIG, PROBES
from loralign.io.host import free_host_memory
from loralign.maths.draws import keyed_generator
from loralign.types import LoralignError, Site, WorkFailed

INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask"),
    *("pixel_values", "input_values", "input_features"),
)
ROWS, POSITIONS, KEPT, FLOATS = 2, 32, 8, 1 << 20
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative difference of logits that a reload may show, by the precision they are computed in."""
SHARE = 0.1
"""Of the adapter's effect: a tolerance above this share proves no scale."""
HALF = (torch.float16, torch.bfloat16)

Layer = Callable[[Tensor], Tensor]
"""The output of an adapted layer as a function of its input."""


@dataclass(frozen=True)
class Recorded:
    """How the stored logits were computed, for whoever computes them again."""

    model_class: str
    labels: int | None
    """Of a head that belongs to the task; the base's config may say another number."""
    vocabulary: int | None
    """Likewise, where the head predicts characters (CTC)."""
    profile: str
    base_dtype: str
    """What the base was loaded in; its weights are rounded to that before anything else."""
    dtype: str
    """What the logits were computed in."""
    device: str
    attention: str | None
    quantization: Mapping[str, Any] | None
    kept: int
    tolerance: float
    effect: float
    """‖logits − base logits‖ / ‖base logits‖: how far the low-rank update moves the model on the probes."""
    lost: float
    """Relative difference of `expected` to `logits`, 0 where the export is exact."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each weight file, so that damage too small to show in the logits is found too."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The same of the config, without the fields that say where the base lies."""
    format: int = 2

    @property
    def coarse(self) -> bool:
        """Whether a wrong scale could hide in the tolerance."""
        return self.tolerance > SHARE * self.effect


@dataclass(frozen=True)
class Difference:
    """Of two arrays of logits: largest and mean absolute, relative in norm, and how often the top choice agrees."""

    largest: float
    mean: float
    relative: float
    top1: float


def difference(got: Tensor, want: Tensor) -> Difference:
    gap = (got - want).abs()
    norm = float(want.norm())
    relative = float(gap.norm()) / norm if norm else float(gap.norm())
    top1 = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    return Difference(float(gap.max()), float(gap.mean()), relative, top1)


# -------------------------------------------------------------------------------------------------------------- inputs


def probe_inputs(model: PeftModel, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """At most 2 rows of the batch, cut to positions that are no padding, without labels; drawn where there is none."""
    base: Any = model.get_base_model()
    if batch is None:
        return _drawn(base)
    if base.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        answers = batch["labels"] if "labels" in batch else batch["input_ids"][:, :1] if "input_ids" in batch else None
        batch = batch if answers is None else {**batch, "decoder_input_ids": _shifted(answers, base.config)}
    rows = {k: v[:ROWS].detach().cpu() for k, v in batch.items() if k in INPUTS and isinstance(v, Tensor)}
    if not rows:
        raise LoralignError(f"the probes hold none of {', '.join(INPUTS)}: pass a batch that the model takes")
    if "attention_mask" in rows:
        used = rows["attention_mask"].bool().all(0).nonzero().flatten()[-POSITIONS:]
        width = rows["attention_mask"].shape[1]
        if len(used):
            rows = {
                k: v[:, used] if v.dim() == 2 and v.shape[1] == width and k != "decoder_input_ids" else v
                for k, v in rows.items()
            }
    return {k: v.contiguous() for k, v in rows.items()}


def _shifted(labels: Tensor, config: Any) -> Tensor:
    first = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] < 0, config.pad_token_id)], dim=1)


def _drawn(base: Any) -> dict[str, Tensor]:
    draw, config = keyed_generator(0, "probes"), text_config(base.config)
    if base.main_input_name == "pixel_values" and getattr(base.config, "image_size", None):
        size = base.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.randn(ROWS, getattr(base.config, "num_channels", 3), height, width, generator=draw)
        }
    if base.main_input_name != "input_ids":
        raise LoralignError(f"cannot draw probes for inputs of kind {base.main_input_name}: pass a batch as `probes`")
    vocabulary = base.get_input_embeddings().weight.shape[0]
    rows = ROWS if config.pad_token_id is not None else 1  # classifiers need a pad token for more
    positions = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = torch.randint(vocabulary, (rows, positions), generator=draw)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        made["decoder_input_ids"] = _shifted(torch.randint(vocabulary, (rows, 8), generator=draw), config)
    return made


# -------------------------------------------------------------------------------------------------------------- logits


@contextmanager
def full_precision(model: nn.Module) -> Iterator[torch.dtype]:
    """Half-precision tensors of the model in fp32 inside the block, where memory allows; yields the precision used."""
    owners: list[tuple[Tensor, Tensor]] = []
    half = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF]
    precision = torch.float32 if not half or (_fits(half) and not is_quantised(model)) else half[0].dtype
    matmul = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        if precision == torch.float32:
            for tensor in half:
                owners.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        yield precision
    finally:
        for tensor, data in owners:
            tensor.data = data
        torch.set_float32_matmul_precision(matmul)


def _fits(half: Sequence[Tensor]) -> bool:
    needed: dict[torch.device, int] = {}
    for tensor in half:
        needed[tensor.device] = needed.get(tensor.device, 0) + 4 * tensor.numel()
    return all(size < 0.8 * _free_bytes(device) for device, size in needed.items())


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_host_memory() if device.type == "cpu" else float("inf")


@torch.no_grad()
def logits(
    model: PeftModel,
    inputs: Mapping[str, Tensor],
    found: Sequence[Site] = (),
    layers: Mapping[str, Layer] | None = None,
) -> Tensor:
    """Logits of the model as it is, or with the layer of each site in `found` replaced by a function of its input."""
    device = next(model.parameters()).device
    training = [m for m in model.modules() if m.training]
    with ExitStack() as undo, torch.autocast(device.type, enabled=False):
        for module in training:
            undo.callback(setattr, module, "training", True)
        if "_original_forward" in vars(model):  # accelerate put a second autocast around forward
            undo.callback(setattr, model, "forward", model.forward)
            model.forward = model._original_forward
        for site in found:
            undo.callback(
                site.layer.register_forward_hook(_replacing((layers or {})[site.name]), with_kwargs=True).remove
            )
        model.eval()
        try:
            out = model(**{k: v.to(device) for k, v in inputs.items()})
        except (TypeError, ValueError) as error:
            raise LoralignError(f"the model does not take the probes {sorted(inputs)}: {error}") from error
    found_logits = [v for k, v in out.items() if k.endswith("logits") and isinstance(v, Tensor)]
    if not found_logits:
        raise LoralignError(f"{type(model.get_base_model()).__name__} returns no logits: nothing to verify by")
    value = found_logits[0].float().cpu()
    value = value[:, -kept(value) :] if value.dim() == 3 else value
    if not bool(value.isfinite().all()):
        raise WorkFailed("the logits on the probes are not finite: the run has diverged, lower the learning rate")
    return value.contiguous()


def kept(value: Tensor) -> int:
    """Last positions that are stored: 8, or so many as keep logits (rows, positions, classes) below 4 MB."""
    return max(1, min(KEPT, FLOATS // max(1, value.shape[0] * value.shape[-1])))


def _replacing(layer: Layer) -> Callable[..., Tensor]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return layer(first_input(args, kwargs)).to(output.dtype)

    return hook


def base_layer(site: Site) -> Layer:
    """W0·x + bias."""
    return site.layer.get_base_layer()  # type: ignore[operator]


def low_rank_layer(site: Site, A: Tensor, B: Tensor, scale: float) -> Layer:
    """W0·x + bias + s·B·(A·x), computed as stock PEFT does: factors in fp32, whatever they are stored in."""

    def layer(x: Tensor) -> Tensor:
        return base_layer(site)(x) + x.float() @ A.to(x.device).float().T @ B.to(x.device).float().T * scale

    return layer


# -------------------------------------------------------------------------------------------------------------- record


def record(
    model: PeftModel, profile: str, precision: torch.dtype, value: Tensor, effect: float, lost: float
) -> Recorded:
    base: Any = model.get_base_model()
    settings = while_loaded(base) or (as_data(base.config.quantization_config) if has_kernels(base) else None)
    fresh = bool(fresh_heads(base))
    name, attention = type(base).__name__, base.config._attn_implementation
    return Recorded(
        model_class=name,
        labels=base.config.num_labels if fresh else None,
        vocabulary=getattr(text_config(base.config), "vocab_size", None) if fresh else None,
        profile=profile,
        base_dtype=str(base.dtype).removeprefix("torch."),
        dtype=str(precision).removeprefix("torch."),
        device=next(model.parameters()).device.type,
        attention=attention if attention in ("eager", "sdpa") else None,
        quantization=None if profile == "merged" else settings,
        kept=kept(value),
        tolerance=TOLERANCE[torch.bfloat16 if has_kernels(base) else precision],
        effect=effect,
        lost=lost,
    )


def write_probes(folder: Path, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor], how: Recorded) -> None:
    """out: logits, and expected and base where they are needed."""
    sums = {path.name: digest(path) for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])}
    config = folder / ("config.json" if how.profile == "merged" else ADAPTER_CONFIG)
    how = replace(how, weights=sums, settings={config.name: digest(config)} if config.is_file() else {})
    (folder / PROBES).parent.mkdir(parents=True, exist_ok=True)
    tensors = {**{f"input.{k}": v for k, v in inputs.items()}, **out}
    save_file(tensors, folder / PROBES, metadata={"loralign": json.dumps(asdict(how), default=str)})
