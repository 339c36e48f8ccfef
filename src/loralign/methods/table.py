"""The table: one line per method. CLI names, validation, docs and conformance tests follow from it.

Learning-rate priors are stated as lr·s at hidden size 2000 and scaled by (2000/hidden)^0.781, the exponent that "LoRA
Without Regret" found for Llama-shaped models.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points

from loralign.maths.bounds import Count, Positive
from loralign.maths.given import checked
from loralign.methods.form.delta_lora import boosted
from loralign.methods.form.gated import beam, gated, normal_gated
from loralign.methods.form.prolora import partial_rotation
from loralign.methods.form.reslora import shortcuts
from loralign.methods.form.sbora import fixed_A, fixed_B
from loralign.methods.form.sd_lora import directions
from loralign.methods.init.cora import common_basis, common_start
from loralign.methods.init.gaussian import gaussian
from loralign.methods.init.hrp import high_rank_preheat, high_rank_sketch
from loralign.methods.init.kaiming import kaiming_frozen
from loralign.methods.init.kaiming_both import kaiming_both
from loralign.methods.init.lora_ga import gradient_svd
from loralign.methods.init.olora import leading_qr
from loralign.methods.init.pissa import principal_svd
from loralign.methods.init.rac_lora import random_side
from loralign.methods.init.sbora import unit_columns, unit_rows
from loralign.methods.outer.chain import chain_of_links, randomized_links, restarts
from loralign.methods.outer.sd_lora import task_links
from loralign.methods.outer.xgblora import boosters
from loralign.methods.reference import muon
from loralign.methods.rule.adalora import sensitivity_budget
from loralign.methods.rule.allocating_lora import allocate
from loralign.methods.rule.beamlora import beam_copies
from loralign.methods.rule.delta_lora import snapshot
from loralign.methods.rule.dynamic_rank import component_budget
from loralign.methods.rule.prilora import depth_and_pruning
from loralign.methods.rule.rm_lora import masked_orthogonal
from loralign.methods.rule.sora import soft_threshold
from loralign.methods.transform.lora_fa import projected_gradient
from loralign.methods.transform.lora_plus import ratio_lr
from loralign.methods.transform.lora_pro import equivalent_gradient
from loralign.methods.transform.lora_rite import invariant_adam
from loralign.methods.transform.muon import matrix_sign, spectral
from loralign.methods.transform.rac_lora import projected_descent
from loralign.methods.transform.riemannian import scaled_gradient
from loralign.types import LoralignError, LrPrior, Method, over_sqrt_rank

log = logging.getLogger("loralign")

_REGRET = "Schulman 2025, LoRA Without Regret: 5e-4·(2000/hidden)^0.781 at alpha 32, here s = 2"
_STUDY = "our H100 study, SmolLM2-135M, r 8, 300 steps, one seed"
_CORA = "our CoRA study on an H100, SmolLM2-135M, r 16, 200 steps, one seed"
_SBORA = "the authors' scripts: 2e-4 at s 2, hidden 4096"
_PROLORA_PAPER = {"alpha": 16.0, "dropout": 0.1, "max_grad_norm": 0.3, "share_A": 7, "share_B": 7}
_SBORA_PAPER = {"paper": {"r": 32, "alpha": 64.0, "dropout": 0.05}}
_SBORA_READ = "the paper's body could not be read: a reconstruction from the authors' figures, tables and scripts"
_LAB = "our laboratory, SmolLM2-135M, German, 300 steps, one seed"
_ASSETS = "our sweep: SmolLM2-135M, r 8, 30 steps; its task was not recorded"
_GERMAN = ("reviews in German (MultiEmo)", "75866f7c82a2555c081ca3ee")
_ITALIAN = ("reviews in Italian (MultiEmo)", "5b59b4098c2bca9baf30994f")

_LINES = (
    Method("lora", "plain LoRA", "2106.09685", "exact", LrPrior(1e-3, _REGRET)),
    Method("rslora", "LoRA with s = alpha/√r", "2312.03732", "exact", LrPrior(1e-3, _REGRET), scale=over_sqrt_rank),
    Method("full", "full fine-tuning of the same matrices (reference)", "", "none",
           LrPrior(5e-5, "a tenth of LoRA's (LoRA Without Regret)"), reference=True),
    Method("lora-ga", "start along the gradient's singular vectors", "2407.05000", "exact at rank 2r",
           LrPrior(2.2e-4, _ASSETS + ": 1e-4 at s 5.66, gamma 16"), init=gradient_svd, scale=over_sqrt_rank,
           presets={"paper": {"r": 8, "alpha": 16.0, "gamma": 16.0},
                    "paper-llama": {"r": 8, "alpha": 16.0, "gamma": 64.0}}),
    Method("hrp", "start along the main directions of a short high-rank run", "2502.07739", "exact",
           LrPrior(3e-3, _STUDY + ": 4e-3 at s 2", tuned_on=_GERMAN), init=high_rank_preheat,
           presets={"paper": {"rank": 128, "kappa": 1.0}},
           unverified="the paper's body could not be read: a reconstruction from its abstracts"),
    Method("hrp-sketch", "as hrp, from accumulated gradients without a step", "2502.07739", "exact",
           LrPrior(3e-3, _STUDY + ": 4e-3 at s 2", tuned_on=_GERMAN), init=high_rank_sketch,
           unverified="the paper's body could not be read: a cheap variant of its reconstruction"),
    Method("cora", "one factor frozen at directions that several models share", "2409.02119", "exact",
           LrPrior(2.9e-3, _CORA + ": 3.9e-3 at s 2", tuned_on=_ITALIAN), init=common_basis,
           presets={"paper": {"side": "left"}},
           unverified="the paper's body could not be read: a reconstruction from its abstract"),
    Method("cora-init", "one factor started at directions that several models share", "2409.02119", "exact",
           LrPrior(2.9e-3, _CORA + ": 3.9e-3 at s 2", tuned_on=_ITALIAN), init=common_start,
           presets={"paper": {"side": "left"}},
           unverified="the paper's body could not be read: a reconstruction from its abstract"),
    Method("lora-plus", "B learns faster than A", "2402.12354", "exact",
           LrPrior(7.6e-4, _STUDY + ": 1e-3 at s 2, ratio 16", tuned_on=_GERMAN), transform=ratio_lr),
    Method("lora-pro", "steps of the product as close to full fine-tuning's as rank r allows", "2407.18242", "exact",
           LrPrior(4.5e-3, _STUDY + ": 6e-3 at s 2; 2.1e-3, full fine-tuning's, for moments: full", tuned_on=_GERMAN),
           transform=equivalent_gradient,
           presets={"paper": {"r": 8, "alpha": 16.0, "moments": "full"}}),
    Method("lora-rite", "adaptive steps that do not depend on how the product is split", "2410.20625", "exact",
           LrPrior(1.6e-3, _STUDY + ": 2.1e-3 at s 2", tuned_on=_GERMAN), transform=invariant_adam,
           fields={"max_grad_norm": 0.0}),  # its own clip does not depend on how the product is split
    Method("rm-lora", "orthogonality regulariser and a random slot mask", "2407.12074", "exact",
           LrPrior(4.5e-3, _STUDY + ": 6e-3 at s 2", tuned_on=_GERMAN), rules=(masked_orthogonal,)),
    Method("delta-lora", "the base follows the product's changes, as r frozen slots", "2309.02411", "exact at rank 2r",
           LrPrior(1.5e-3, _STUDY + ": 2e-3 at s 2, wait_steps 50", tuned_on=_GERMAN), form=boosted, rules=(snapshot,)),
    Method("adalora", "fewer slots over time: those stay that matter steadily to the loss", "2303.10512",
           "exact, ragged ranks", LrPrior(7.9e-4, "AdaLoRA's script for BART-large: 5e-4 at s 2.67, hidden 1024"),
           init=gaussian, form=gated, rules=(sensitivity_budget,),
           presets={"paper": {"r": 8, "alpha": 21.3, "first": 0.1, "last": 0.3, "interval": 100, "orthogonal": 0.1}},
           unverified="the paper's text was not at hand: its equations as its official code has them"),
    Method("dynamic-rank-lora", "fewer slots over time: those stay that are large within their module", "2405.17357",
           "exact, ragged ranks", LrPrior(None, "unknown"),
           init=kaiming_both, form=gated, rules=(component_budget,),
           presets={"paper": {"r": 8, "alpha": 5.33, "first": 0.15, "last": 0.5, "interval": 100, "variance": 0.1}},
           unverified="the paper's text was not at hand: equations as its code and third parties have them"),
    Method("sora", "gates shrink at each step, slots whose gate reaches zero are gone", "2311.11696",
           "exact, ragged ranks", LrPrior(3.8e-4, "SoRA's script for STS-B: 8e-4 at s 1 (as its default), hidden 768"),
           form=normal_gated, rules=(soft_threshold,),
           presets={"paper": {"r": 8, "alpha": 8.0, "threshold": 3e-4}},
           unverified="the paper's body was not at hand: its operator as abstract, README and code have it"),
    Method("beamlora", "light slots are overwritten by copies of what heavy ones were", "2502.13604", "exact",
           LrPrior(1.05e-3, "BeamLoRA's script: 3e-4 at s 2, hidden 4096 (LLaMA-2-7B)"),
           form=beam, rules=(beam_copies,),
           presets={"paper": {"r": 64, "alpha": 128.0, "dropout": 0.05, "interval": 3000}},
           unverified="the paper's body was not at hand: its law and actions as its code has them"),
    Method("allocating-lora", "slots move to modules that the validation loss would rather have", "2403.16187",
           "exact, ragged ranks", LrPrior(None, "unknown"), rules=(allocate,),
           presets={"paper": {"r": 8, "rounds": 8, "first": 0.1, "every": 0.025, "rows": 32}},
           unverified="the number of slots per round is inferred from the paper's parameter counts"),
    Method("prilora", "ranks grow with depth, unimportant entries of A become zero now and then", "2401.11316",
           "exact, ragged ranks", LrPrior(None, "unknown"), rules=(depth_and_pruning,),
           presets={"paper": {"r": 8, "first_share": 0.5, "last_share": 1.5, "interval": 40, "pruned": 0.5}},
           unverified="the paper's body could not be read: constants and the comparison within a row are provisional"),
    Method("lora-fa", "A frozen at random, B follows the projected gradient", "2308.03303", "exact",
           LrPrior(2.6e-2, _CORA + ": 3.5e-2 at s 2", tuned_on=_ITALIAN),
           init=kaiming_frozen, transform=projected_gradient),
    Method("riemannian", "gradients preconditioned by the other factor's Gram matrix", "2402.02347", "exact",
           LrPrior(4.5e-3, _STUDY + ": 6e-3 at s 2, 1.8e-2 is less steady", tuned_on=_GERMAN),
           transform=scaled_gradient),
    Method("full-muon", "full fine-tuning of the same matrices with Muon (reference)", "2502.16982", "none",
           LrPrior(2e-3, _LAB + ": 2e-3; how it moves with the width is unknown", power=0.0),
           reference=True, optimizer=muon),
    Method("spectral", "every direction of wide factors moves equally far", "2502.16982", "exact",
           LrPrior(1.2e-2, _LAB + ": lr·s·√width = 0.54 at r 64, width 576; on other widths: "
                   "records/2026-11-29-cpu-width", power=0.5),
           transform=spectral, scale=over_sqrt_rank, fields={"r": 64, "alpha": None, "max_grad_norm": 0.0},
           presets={"stateless": {"momentum": 0.0}}),
    Method("muon-factors", "orthogonalised momentum on each factor", "2502.16982", "exact",
           LrPrior(4.5e-3, _STUDY + ": 6e-3 at s 2", tuned_on=_GERMAN), transform=matrix_sign, renamed="spectral"),
    Method("pissa", "start along the weight's principal singular vectors", "2404.02948", "exact at rank 2r",
           LrPrior(2.3e-4, _ASSETS + ": 3e-4 at s 2"), init=principal_svd),
    Method("sbora-fa", "r columns of W train: A is rows of the identity", "2407.05413", "exact", LrPrior(7e-4, _SBORA),
           init=unit_rows, form=fixed_A, presets=_SBORA_PAPER, unverified=_SBORA_READ),
    Method("sbora-fb", "r rows of W train: B is columns of the identity", "2407.05413", "exact", LrPrior(7e-4, _SBORA),
           init=unit_columns, form=fixed_B, presets=_SBORA_PAPER, unverified=_SBORA_READ),
    Method("prolora", "chunks of A and B repeat with their ranks rotated", "2402.16902", "exact",
           LrPrior(1.75e-4, "the paper: 2e-4 at s 0.5, hidden 4096, searched with LoRA"), form=partial_rotation,
           presets={"paper": {**_PROLORA_PAPER, "r": 32, "unshared": 4},
                    "paper-small": {**_PROLORA_PAPER, "r": 8, "unshared": 1}}),
    Method("reslora", "every module adds the adapters of the blocks before it", "2402.18039", "exact, ragged ranks",
           LrPrior(3.5e-4, "the authors' scripts: 1e-4 at s 2, hidden 4096"), form=shortcuts,
           presets={"paper": {"r": 4, "alpha": 8.0, "dropout": 0.1, "weight_decay": 0.1}},
           unverified="the paper's tables could not be read; formulas from a translation and the authors' code"),
    Method("olora", "start from the weight's QR factorisation", "2406.01775", "exact at rank 2r",
           LrPrior(5e-5, "2602.04998: 0.055 of LoRA's"), init=leading_qr),
    Method("chain-of-lora", "links of plain LoRA, each fixed before the next", "2401.04151", "exact, rank grows",
           LrPrior(None, "unknown"), outer=chain_of_links,
           presets={"paper": {"r": 8, "alpha": 16.0, "links": 3}},
           unverified="the paper's body could not be read: from a digest and other people's code"),
    Method("rac-lora", "links with one factor drawn at random and frozen", "2410.08305", "exact, rank grows",
           LrPrior(None, "unknown"), init=random_side, outer=randomized_links,
           presets={"paper": {"r": 2, "links": 10, "frozen": "A"}},
           unverified="the paper's body could not be read: from reviews and code"),
    Method("rac-lora-exact", "as rac-lora, by projected descent on W", "2410.08305", "exact, rank grows",
           LrPrior(None, "unknown"), init=random_side, transform=projected_descent, outer=randomized_links,
           fields={"max_grad_norm": 0.0},  # a clipped step is not the exact one
           presets={"paper": {"frozen": "A", "link_steps": 1}},
           unverified="the paper's body could not be read: from reviews"),
    Method("xgblora", "boosters of rank 1, each at a random part of the layers", "2410.19694", "exact, ragged ranks",
           LrPrior(None, "unknown"), outer=boosters, fields={"r": 1, "alpha": 16.0},
           presets={"paper": {"r": 1, "choice": "uniform", "fraction": 11 / 32}},
           unverified="the paper's body could not be read: from its abstract, reviews and other people's code"),
    Method("sd-lora", "a direction for every task, how far to go along each goes on training", "2501.13198",
           "exact, rank grows", LrPrior(None, "unknown: the authors' 8e-3 is for SGD or Adam on ViT-B/16, s 1"),
           form=directions, outer=task_links, fields={"r": 10, "alpha": None},
           presets={"paper": {"r": 10}, "paper-rr": {"r": 10, "later_ranks": (8, 6)},
                    "paper-kd": {"r": 10, "absorb": 9e-4},
                    "code": {"r": 10, "current": "raw", "norm": "factors", "magnitude": 0.8}},
           unverified="the paper's body could not be read: from a third party's summary and the authors' code"),
    Method("relora", "links of many steps with warm-ups of their own (baseline)", "2307.05695", "exact, rank grows",
           LrPrior(None, "unknown"), outer=restarts,
           presets={"paper": {"r": 128, "alpha": 32.0, "dropout": 0.1, "link_steps": 1000}},
           unverified="the optimizer state is cleared at a knot, where the code prunes it"),
)  # fmt: skip


def _table() -> dict[str, Method]:
    found = {m.id: m for m in _LINES}
    for entry in entry_points(group="loralign.methods"):
        method = entry.load()
        found.setdefault(method.id, method)
    return found


METHODS: Mapping[str, Method] = _table()

AMBIGUOUS: Mapping[str, tuple[str, ...]] = {
    "dora": ("dynamic-rank-lora", "PEFT's use_dora (weight-decomposed DoRA, not in loralign)"),
    "alora": ("allocating-lora", "activated LoRA (not in loralign)"),
    "s-lora": ("sd-lora", "the S-LoRA serving system (not in loralign)"),
}
"""Short names that mean two things in the field."""
RESOLVED = {
    "recommended": "is resolved for one run, by `loralign train`, `init` and `plan`, and mixes with nothing: name "
    "`spectral` with rank 64 here",
}
"""Names that stand for a recipe only where a model, its rows and a memory are known."""
ELSEWHERE = {
    "qlora": "is LoRA on a quantised base: set `method: lora` and `quantize: nf4`",
}
"""Names of what is no method here, but the base's or the run's to decide."""


def method(name: str) -> Method:
    """The line of a method id; unknown and ambiguous names raise with the candidates."""
    key = name.strip().lower().replace("_", "-")
    if not key:
        raise LoralignError("a method's name is missing: write one, or a mix such as `lora-ga + lora-rite`")
    if key in METHODS:
        return METHODS[key]
    if key in AMBIGUOUS:
        raise LoralignError(f"{name!r} means two things in the field: {' or '.join(AMBIGUOUS[key])}; use the long id")
    if key in RESOLVED:
        raise LoralignError(f"{key!r} {RESOLVED[key]}")
    if key in ELSEWHERE:
        raise LoralignError(f"{key!r} {ELSEWHERE[key]}")
    near = difflib.get_close_matches(key, [*METHODS, *RESOLVED], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " * bool(near)
    raise LoralignError(f"unknown method {name!r:.80}; {hint}`loralign methods` lists all")


def tuned_on(name: str) -> tuple[tuple[str, str], ...]:
    """Task and fingerprint of its training rows for every prior of a method or mix that was tuned where we know."""
    found = (method(part).prior.tuned_on for part in name.split("+"))
    return tuple(dict.fromkeys(task for task in found if task))


@checked
def learning_rate(name: str, s: Positive, hidden: Count) -> tuple[float, str]:
    """The prior of a method or mix at scale s and hidden size, and where it comes from.

    lr = lr_s/s · (2000/hidden)^power, the smallest of a mix's; LoRA's where nobody tuned the method, and said so.
    """
    lines = [method(part) for part in name.split("+")]
    priors = [line.prior for line in lines if line.prior.lr_s is not None]
    unknown = [line.id for line in lines if line.prior.lr_s is None]
    prior = min(priors, key=lambda p: p.lr_s or 0.0) if priors else METHODS["lora"].prior
    source = prior.source + (f"; unknown for {', '.join(unknown)}" if unknown else "")
    return float(prior.lr_s or 0.0) / s * (2000 / hidden) ** prior.power, source
