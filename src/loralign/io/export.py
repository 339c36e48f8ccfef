"""Export: an ordinary PEFT adapter (or a merged model) from whatever trained, exact or with its loss stated.

    peft       rank and scale by site, as stock PEFT reads them; fully trained heads travel along
               and a compact file of what a form trains, where that is smaller (`compact.py`)
    portable   one rank, scale 1, nothing but lora_A and lora_B: read alike by PEFT, vLLM, llama.cpp, SGLang and TGI
    gguf       the same as one file in llama.cpp's own format, for it and Ollama
    merged     W0 + B·A in the base's own dtype, a model without adapter

Only `factors(site)` is read, so twins, chains and forms export by the same lines. The folder holds the adapter, a model
card and `verify/probes.safetensors` (inputs and logits of this process), from which `verify` proves a copy anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from peft import PeftModel
from torch import Tensor

from loralign.carrier.packed import is_quantised, while_loaded
from loralign.carrier.sites import ADAPTER, sites
from loralign.carrier.slot import LowRankVariant
from loralign.carrier.targets import PREFIX
from loralign.io.adapter_file import adapter_config, check_supported, other_tensors, trained_modules, write_adapter
from loralign.io.card import Card, write_card
from loralign.io.compact import write_compact
from loralign.io.folder import check_free, fresh_folder
from loralign.io.gguf_adapter import gguf_names, write_gguf
from loralign.io.layout import (
    Product,
    Stored,
    empty_slots,
    inhabited,
    limited,
    loss,
    one_alpha,
    padded,
    read,
    rounded,
    uniform,
)
from loralign.io.merged import merged_layers, merged_state, write_merged
from loralign.io.portable import check_portable, needed_max_lora_rank, serving_note
from loralign.io.probes import (
    Layer,
    Recorded,
    base_layer,
    difference,
    full_precision,
    logits,
    low_rank_layer,
    probe_inputs,
    record,
    write_probes,
)
from loralign.io.public import base_name, make_public
from loralign.io.report import ExportReport as ExportReport
from loralign.maths.given import checked, said
from loralign.types import LoralignError, Site, WorkFailed

log = logging.getLogger("loralign")

Profile = Literal["peft", "portable", "gguf", "merged"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@checked
def export(
    model: PeftModel,
    out: Path | str,
    *,
    profile: Profile = "peft",
    dtype: torch.dtype | None = None,
    base_id: str | None = None,
    revision: str | None = None,
    max_rank: Annotated[int, Interval(ge=1)] | None = None,
    drop: Mapping[str, Sequence[int]] | None = None,
    power_of_two: bool = False,
    probes: Mapping[str, Any] | None = None,
    card: Card | None = None,
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the trained adapter to the folder `out`, which appears whole or not at all; the model is not changed.

    Args:
        dtype: of the stored factors; None: fp32 as trained. torch.bfloat16 halves the file, its error is reported.
        base_id: hub id of the base for the config; default: what the model was loaded from, never a local path.
        revision: commit of the base; default: the one that was loaded, where Transformers knows it.
        max_rank: truncate sites above this rank; the error is reported, per site and in total.
        drop: slots to leave out by site (positions in the folded factors); each must be zero. None: those that a rule
            left dead or switched off; a module that has no other is left out (profile portable: padded).
        power_of_two: profile portable pads the rank to the next power of two.
        probes: a batch that the model takes, for `verify`; None: drawn inputs.
        card: facts for the model card; what the export knows itself is filled in.
        tokenizer: saved beside the adapter or the merged model.
        overwrite: write into a folder that is not empty; an earlier result in it is replaced, other files stay.
    Raises:
        LoralignError: an adapter or target that cannot be exported this way, with the alternative.
        WorkFailed: not finite values, a full disk; nothing is left behind.
    """
    folder, found = Path(out), _found(model)
    if dtype is not None and dtype not in DTYPES:
        raise LoralignError(f"export() stores factors as {', '.join(map(str, DTYPES))}, not as {dtype}")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise LoralignError(f"export() takes a loaded tokenizer, not {said(tokenizer)}")
    config = model.peft_config[ADAPTER]
    check_exportable(model)
    base, commit = base_name(model, base_id, revision)
    heads = other_tensors(model, ADAPTER)
    if power_of_two and profile in ("peft", "gguf"):
        raise LoralignError(f"only profile portable pads ranks: leave the power of two out of profile {profile}")
    if profile in ("portable", "gguf"):
        _refuse_heads(heads)
    names = gguf_names(model, found) if profile == "gguf" else {}
    if folder.is_dir() and _is_base(model, folder):
        raise LoralignError(f"{folder} holds the base model itself: name another folder")
    check_free(folder, overwrite=overwrite)
    products = read(found, empty_slots(found) if drop is None else drop)
    kept, truncation = limited(products, max_rank)
    report = ExportReport(
        profile=profile,
        base=base,
        revision=commit,
        model_class=type(model.get_base_model()).__name__,
        task=config.task_type,
        dtype="float32",
        ranks={},
        exact=True,
        method_exact=_exact_forms(found),
        truncation=truncation,
        cut_to=max_rank or 0,
        quantization=while_loaded(model.get_base_model()),
    )
    inputs = probe_inputs(model, probes)
    make = _merged if profile == "merged" else _adapter
    written = make(model, found, kept, report, dtype, power_of_two)
    report, how, computed = _measured(model, found, inputs, written)
    with fresh_folder(folder, overwrite=overwrite) as temporary:
        if profile == "merged":
            write_merged(temporary, model, written.state)
        elif profile == "gguf":
            write_gguf(temporary, model, written.stored, names, report)
        else:
            portable = profile == "portable"
            settings = adapter_config(model, ADAPTER, written.stored, portable=portable, base=base, revision=commit)
            write_adapter(temporary, settings, written.stored, heads, model)
            if not portable and report.exact and not drop:
                report = replace(report, compact=write_compact(temporary, found, heads))
            report = replace(report, traps=tuple(check_portable(temporary)))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        make_public(temporary)
        write_probes(temporary, inputs, computed, how)
        write_card(temporary, replace(card or Card(base), base=base, revision=commit, export=report))
        if portable_traps := report.traps if profile == "portable" else ():
            raise LoralignError(f"not portable: {portable_traps[0]}")
    for what, lost in (("truncation", report.truncation), (report.dtype, report.rounding)):
        if lost is not None and lost.total > 0.01:
            log.warning("%s: %s changes the update by %.1f %%", folder.name, what, 100 * lost.total)
    return report


def _refuse_heads(heads: Mapping[str, Tensor]) -> None:
    """No server reads modules that trained whole."""
    if heads:
        names = sorted({k.removeprefix(PREFIX).rsplit(".", 1)[0] for k in heads})
        raise LoralignError(
            f"{', '.join(names)} was trained in full (modules_to_save), which vLLM refuses and llama.cpp aborts on: "
            "use profile peft or merged"
        )


def check_exportable(model: PeftModel) -> None:
    """Raise LoralignError where the adapter, once trained, could not be written; asked before training, too."""
    check_supported(model.peft_config[ADAPTER])
    trained_modules(model)


@dataclass(frozen=True)
class _Written:
    """What will be written, and the function it computes."""

    report: ExportReport
    layers: Mapping[str, Layer]
    stored: Mapping[str, Stored]
    state: Mapping[str, Tensor]


def _adapter(
    model: PeftModel,
    found: Sequence[Site],
    products: Mapping[str, Product],
    report: ExportReport,
    dtype: torch.dtype | None,
    power_of_two: bool,
) -> _Written:
    portable = report.profile == "portable"
    scales = {site.name: site.s for site in found}
    if portable:
        stored = padded(products, power_of_two=power_of_two)
    else:
        stored = (one_alpha if report.profile == "gguf" else uniform)(inhabited(products), scales)
    products = {n: products[n] for n in stored}
    rounding = None
    if dtype is not None and dtype != torch.float32:
        stored = rounded(stored, dtype)
        rounding = loss(products, stored)
    R = max(s.rank for s in stored.values())
    if portable and needed_max_lora_rank(R) is None:
        raise LoralignError(serving_note(R))
    report = replace(
        report,
        dtype=str(dtype or torch.float32).removeprefix("torch."),
        ranks={n: s.rank for n, s in stored.items()},
        exact=report.method_exact and report.truncation is None and rounding is None,
        rounding=rounding,
    )
    layers = {
        site.name: low_rank_layer(site, *stored[site.name][:2], stored[site.name].scale)
        if site.name in stored
        else base_layer(site)
        for site in found
    }
    return _Written(report, layers, stored, {})


def _merged(
    model: PeftModel,
    found: Sequence[Site],
    products: Mapping[str, Product],
    report: ExportReport,
    dtype: torch.dtype | None,
    power_of_two: bool,
) -> _Written:
    if dtype is not None or power_of_two:
        raise LoralignError("a merged model keeps the dtype of its base and has no rank: leave dtype and padding out")
    state = merged_state(model, found, products)
    stored_in = str(state[f"{found[0].name}.weight"].dtype).removeprefix("torch.")
    quantised = is_quantised(model)
    report = replace(
        report,
        dtype=stored_in,
        exact=report.method_exact and report.truncation is None and stored_in == "float32" and not quantised,
        merged_into=f"{'dequantised weights of the quantised base' if quantised else 'the weights'}, {stored_in}",
    )
    return _Written(report, merged_layers(found, state), {}, state)


def _measured(
    model: PeftModel, found: Sequence[Site], inputs: Mapping[str, Tensor], written: _Written
) -> tuple[ExportReport, Recorded, dict[str, Tensor]]:
    """Logits of the trained model and, where they are not the same function, of what will be written."""
    report = written.report
    with full_precision(model) as precision:
        found_logits = {"logits": logits(model, inputs)}
        base = logits(model, inputs, found, {site.name: base_layer(site) for site in found})
        if report.profile == "merged" or not report.exact:
            found_logits["expected"] = logits(model, inputs, found, written.layers)
    value, lost = found_logits["logits"], 0.0
    if "expected" in found_logits:
        report = replace(report, difference=difference(found_logits["expected"], value))
        lost = difference(found_logits["expected"], value).relative
    how = record(model, report.profile, precision, value, difference(value, base).relative, lost)
    if how.coarse and report.profile != "merged":
        found_logits["base"] = base
    return replace(report, labels=how.labels), how, found_logits


def _found(model: PeftModel) -> list[Site]:
    if not isinstance(model, PeftModel) or ADAPTER not in model.peft_config:
        raise LoralignError(
            "there is no adapter to export: pass the adapted model that `adapt` or the trainer returned"
        )
    found = sites(model, ADAPTER)
    if not found:
        raise LoralignError("the adapter has no sites: there is nothing to export")
    if any(site.layer.merged for site in found):
        raise WorkFailed("the adapter is merged into the base in memory: call unmerge_adapter() before exporting")
    return found


def _exact_forms(found: Sequence[Site]) -> bool:
    variants = (site.layer.lora_variant.get(site.adapter) for site in found)  # type: ignore[operator, union-attr]
    return all(v.form.facts.exact for v in variants if isinstance(v, LowRankVariant))


def _is_base(model: PeftModel, folder: Path) -> bool:
    """Whether this folder is the one that the base was loaded from."""
    base: Any = model.get_base_model()
    return bool(base.name_or_path) and Path(base.name_or_path).is_dir() and folder.samefile(base.name_or_path)
