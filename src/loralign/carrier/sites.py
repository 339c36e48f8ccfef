"""Which modules are adapted: build the PEFT config, put the adapter in, list the sites, fold them out."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from loralign.carrier.abilities import modules_to_save, task_type
from loralign.carrier.gathered import fold_gathered
from loralign.carrier.packed import make_lean
from loralign.carrier.slot import effective, is_adapted, whole
from loralign.carrier.storage import SlotLinear
from loralign.carrier.targets import PREFIX, anchored, by_weight, chosen, ranks_of, strangers
from loralign.maths.draws import keyed_generator
from loralign.maths.given import checked
from loralign.types import Draw, Full, LoralignError, Recipe, Site, Weight

ADAPTER = "default"


@checked
def peft_config(recipe: Recipe, model: nn.Module, *, adapted: bool = False) -> LoraConfig:
    """The stock `LoraConfig` of a recipe: what `get_peft_model` or a TRL trainer takes.

    adapted: the model already carries this adapter (to compare configs); otherwise that is an error.
    """
    if is_adapted(model) and not adapted:
        raise LoralignError("the model already carries an adapter: merge it or load the plain base model first")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = chosen(base, recipe.targets, recipe.exclude)
    if recipe.r < 1 or any(r < 1 for r in recipe.ranks.values()):
        raise LoralignError("ranks start at 1; to skip a module name it in `exclude`")
    indirect = by_weight(base, found)
    if indirect and recipe.dropout:
        raise LoralignError(f"PEFT adapts {indirect[0]} by its weight, where dropout cannot act: set `dropout: 0`")
    weights = [f"{n}.weight" for n in indirect] or None
    described = inserted(recipe, list(found))
    common = Counter(described.values()).most_common(1)[0][0]
    odd = {anchored(n, weights): v for n, v in described.items() if v != common}
    return LoraConfig(
        r=common[0],
        lora_alpha=common[1],
        lora_dropout=recipe.dropout,
        target_modules=[n for n in found if n not in indirect],
        target_parameters=weights,
        exclude_modules=strangers(base, found) or None,
        modules_to_save=modules_to_save(base) or None,
        rank_pattern={k: v[0] for k, v in odd.items()},
        alpha_pattern={k: v[1] for k, v in odd.items()},
        task_type=task_type(base),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in found.values()),
    )


def inserted(recipe: Recipe, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Slots and alpha of every module: the recipe's rank sets s, its rule may want more slots or other ones."""
    ranks = ranks_of(names, recipe.r, recipe.ranks)
    wanted = next((rule.facts.slots for rule in recipe.rules if rule.facts.slots is not None), None)
    slots = ranks if wanted is None else wanted(ranks)
    return {n: (slots[n], exact_alpha(recipe.s(ranks[n]), slots[n])) for n in names}


def put_in(model: nn.Module, recipe: Recipe) -> PeftModel:
    """Insert the stock PEFT adapter of a recipe (W_eff = W0 still); raises when no module matches."""
    made: PeftModel = get_peft_model(model, peft_config(recipe, model))
    as_layers(made)
    return made


def as_layers(model: PeftModel, adapter: str = ADAPTER) -> None:
    """Linear layers that PEFT reached by their weight become its ordinary adapted layers, layers around torchao's
    weights keep no copies of them; names and values stay."""
    make_lean(model)
    config = model.peft_config[adapter]
    for name, wrapper in list(model.named_modules()):
        if type(wrapper).__name__ != "ParamWrapper" or not isinstance(wrapper.base_layer, nn.Linear):
            continue
        with torch.random.fork_rng(devices=[]):
            layer = Linear(
                wrapper.base_layer, adapter, config, r=wrapper.r[adapter], lora_alpha=wrapper.lora_alpha[adapter]
            )
        layer.lora_A, layer.lora_B = wrapper.lora_A, wrapper.lora_B
        layer.scaling = wrapper.scaling
        layer.train(wrapper.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


@checked
def sites(model: nn.Module, adapter: str = ADAPTER) -> list[Site]:
    """The adapted linear maps in the order of the model, with shapes (d_out, d_in) also for Conv1D."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter in layer.lora_embedding_A or type(layer).__name__ == "ParamWrapper":
            raise LoralignError(
                f"{name.removeprefix(PREFIX)} holds an embedding or fused experts, which are no linear layers: "
                "leave it out of `targets`"
            )
        if adapter not in layer.lora_A:
            continue
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        if not isinstance(A, nn.Linear):
            raise LoralignError(f"{name} is no linear layer ({type(A).__name__}): leave it out of `targets`")
        live = A.live if isinstance(A, SlotLinear) else A.weight
        short = name.removeprefix(PREFIX)
        shape = (B.out_features, A.in_features)
        found.append(Site(short, layer, adapter, *shape, int(live.shape[0]), float(layer.scaling[adapter])))
    return found


def skipped(model: nn.Module, found: Sequence[Site]) -> dict[str, str]:
    """Linear modules and fused expert parameters that stay as they are, with the reason."""
    adapted = {site.name for site in found}
    reasons = {}
    for name, module in model.named_modules():
        short = name.removeprefix(PREFIX)
        parts = short.split(".")
        if any(".".join(parts[:n]) in adapted for n in range(1, len(parts) + 1)):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            reasons[short] = "output head or not in `targets`"
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{short}.{key}":
                reasons[f"{short}.{key}"] = "fused expert parameter"
    return reasons


def differing_target(model: PeftModel, recipe: Recipe) -> str:
    """How the adapted modules differ from the recipe's targets ("leaves out model.x"), "" where they do not."""
    wanted, found = chosen(model.get_base_model(), recipe.targets, recipe.exclude), [s.name for s in sites(model)]
    extra, missing = [n for n in found if n not in wanted], [n for n in wanted if n not in found]
    return f"adapts {extra[0]}" if extra else f"leaves out {missing[0]}" if missing else ""


def beside(model: PeftModel) -> dict[str, nn.Parameter]:
    """Parameters of the base that train though no adapter and no `modules_to_save` holds them, by their base names."""
    base = model.get_base_model()
    kept = [f"{n}." for n, m in base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return {
        n.replace(".base_layer.", "."): p
        for n, p in base.named_parameters()
        if p.requires_grad and ".lora_" not in n and not any(n.startswith(k) for k in kept)
    }


def weight(site: Site) -> Weight:
    """The frozen base weight of a site; `read()` gives W (d_out, d_in) in fp32, dequantised, as a copy."""

    def read() -> Tensor:
        base: Any = site.layer.get_base_layer()  # type: ignore[operator]
        kept = getattr(base, "weight", None)
        W = whole(dequantize_module_weight(base).detach()).to(torch.float32, copy=True)
        if kept is not None and base.weight is not kept:  # PEFT's copy of an 8-bit weight on the CPU has no scales
            base.weight = kept
        return W.T.contiguous() if isinstance(base, Conv1D) else W

    return Weight(site.name, (site.d_out, site.d_in), read)


@dataclass(frozen=True)
class KeyedDraw:
    """Keyed randomness of one site, or of a run (name "")."""

    seed: int
    name: str
    link: int = 0

    def __call__(self, purpose: str, step: int = 0) -> torch.Generator:
        later = (self.link,) if self.link else ()
        return keyed_generator(self.seed, purpose, step, self.name, *later)


def draw_for(seed: int, name: str = "", link: int = 0) -> Draw:
    """Keyed randomness of one site, or of a run (name "")."""
    return KeyedDraw(seed, name, link)


@checked
def factors(site: Site) -> tuple[Tensor, Tensor]:
    """(A (R, d_in), B (d_out, R)), fp32, scale and every fold included: W_eff = W0 + B·A."""
    A, B = effective(site.layer, site.adapter)
    return A.detach().float(), B.detach().float() * site.s


def target_weights(model: nn.Module, reference: Full) -> dict[str, nn.Parameter]:
    """The weight matrices that a recipe with these targets would adapt; for full fine-tuning of the same matrices."""
    found = chosen(model, reference.targets, reference.exclude)
    return {name: module.weight for name, module in found.items()}  # type: ignore[misc]


def exact_alpha(s: float, R: int) -> float:
    """alpha with alpha / R == s in double precision (where no such alpha exists: one part in 1e16 away)."""
    alpha = float(s * R)
    return int(alpha) if alpha.is_integer() else alpha


def sync_config(model: Any, adapter: str = ADAPTER) -> None:
    """r, alpha and patterns of the config describe the folded adapter, whatever slots it has by now."""
    found = [site for site in sites(model, adapter) if isinstance(site.layer.lora_A[adapter], SlotLinear)]  # type: ignore[index]
    if not found:
        return
    described: dict[str, tuple[int, float]] = {}
    for site in found:
        layer: Any = site.layer
        with torch.no_grad():
            sharded = isinstance(layer.lora_A[adapter].live, DTensor)
            R = site.r + layer.lora_A[adapter].used if sharded else effective(layer, adapter)[0].shape[0]
        alpha = exact_alpha(site.s, R)
        layer.r[adapter], layer.lora_alpha[adapter], layer.use_rslora[adapter] = R, alpha, False
        described[site.name] = (R, alpha)
    config = model.peft_config[adapter]
    common = Counter(described.values()).most_common(1)[0][0]
    odd = {anchored(n, config.target_parameters): v for n, v in described.items() if v != common}
    config.r, config.lora_alpha = common
    config.use_rslora = False
    config.rank_pattern = {k: v[0] for k, v in odd.items()}
    config.alpha_pattern = {k: v[1] for k, v in odd.items()}


def _save_folded(model: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` that folds what FSDP2 or accelerate gathered, with the config in step."""
    if lost := beside(model):
        raise LoralignError(
            f"{next(iter(lost))} trains beside the adapter, and PEFT does not save it: write with loralign.export, or "
            "name its module in `modules_to_save` of the PEFT config"
        )
    given = kwargs.pop("state_dict", None)
    state = dict(model.state_dict() if given is None else given)
    for adapter in model.peft_config:
        sync_config(model, adapter)
        fold_gathered(model, adapter, state)
    return type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)


def keep_saving_right(model: PeftModel) -> None:
    """Make `model.save_pretrained` fold and describe slots, and refuse what a file would lack.

    An instance attribute: survives deepcopy and pickling.
    """
    model.save_pretrained = functools.partial(_save_folded, model)
    sync_config(model)
