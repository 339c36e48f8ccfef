"""The compact file of an adapter: what its form trains, from which its factors follow exactly.

    compact/compact.safetensors   "A|site", "B|site"     factors that train
                                  "<tensor>|site"        the form's own tensors and constants (indices as int32)
                                  "other|<name>"         modules that trained whole
    metadata "loralign"           method and arguments of the form, its version, sizes and scales of the sites, and the
                                  text of the plain adapter's config

`expand` writes the plain adapter again, bit for bit. A file is written where it is smaller than the factors: half for
SBoRA, a fraction for PRoLoRA. In a sub-folder, because servers read every *.safetensors file of the adapter's own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loralign.carrier.sites import draw_for
from loralign.carrier.slot import form_of, live_of
from loralign.carrier.targets import PREFIX
from loralign.io.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, COMPACT, fresh_folder, writing
from loralign.io.layout import Product, uniform
from loralign.methods.table import METHODS
from loralign.types import Form, Live, LoralignError, Site, Weight

FORMAT = 1
WORTH = 0.9
"""Largest share of the factors' bytes at which a compact file is written."""


def named_form(form: Form) -> tuple[str, dict[str, Any]] | None:
    """The method of the table, and the arguments, that make this form; None for a stranger's."""
    for line in METHODS.values():
        if line.form is None:
            continue
        names = list(inspect.signature(line.form).parameters)
        args = {name: getattr(form, name) for name in names if hasattr(form, name)}
        if len(args) < len(names):
            continue
        with suppress(LoralignError):  # another form's field of the same name may be no argument of this one
            if line.form(**args) == form:
                return line.id, args
    return None


def write_compact(folder: Path, found: Sequence[Site], others: Mapping[str, Tensor]) -> float | None:
    """Beside the plain adapter in `folder`, whose config it repeats: its bytes over the adapter's; None where it would
    not be smaller."""
    form = form_of(found[0].layer, found[0].adapter)
    named = None if form is None or form.facts.identity else named_form(form)
    if form is None or named is None:
        return None
    tensors: dict[str, Tensor] = {}
    for site in found:
        live = live_of(site.layer, site.adapter)
        if live.A0.numel() or live.B0.numel() or live.shared:
            return None
        stock = {side: getattr(live, side) for side in form.facts.stock}
        tensors |= {f"{key}|{site.name}": _small(value) for key, value in {**stock, **live.own}.items()}
    plain = 4 * sum(sum(f.numel() for f in _factors_of(site)) for site in found)
    if sum(t.nbytes for t in tensors.values()) > WORTH * plain:
        return None
    meta = {
        "format": FORMAT,
        "method": named[0],
        "args": named[1],
        "version": form.facts.version,
        "sites": {site.name: [site.r, site.d_out, site.d_in, site.s] for site in found},
        "config": (folder / ADAPTER_CONFIG).read_text(encoding="utf-8"),
    }
    tensors |= {f"other|{key}": value for key, value in others.items()}
    (folder / COMPACT).parent.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / COMPACT, {"loralign": json.dumps(meta)})
    return (folder / COMPACT).stat().st_size / (folder / ADAPTER_WEIGHTS).stat().st_size


def _factors_of(site: Site) -> tuple[Tensor, Tensor]:
    layer: Any = site.layer
    A, B = layer.lora_variant[site.adapter].dense(layer, site.adapter)
    return A, B


def _small(value: Tensor) -> Tensor:
    value = value.detach().cpu().clone()
    return value.float() if value.is_floating_point() else value.to(torch.int32)


# ------------------------------------------------------------------------------------------------------------- reading


def expand(file: Path | str, out: Path | str) -> int:
    """Write the plain adapter of a compact file to the new folder `out`; the number of adapted modules.

    Raises LoralignError for a file that is damaged, of another version or of an unknown method.
    """
    path = Path(file)
    meta, tensors = _read(path)
    try:
        form, sizes = _form(meta), {n: (int(r), int(o), int(i), float(s)) for n, (r, o, i, s) in meta["sites"].items()}
        live = {name: _live(form, name, size, tensors) for name, size in sizes.items()}
        products = {n: product for n, product in _products(form, live, sizes)}
        config = json.dumps(json.loads(meta["config"]), indent=2, sort_keys=True) + "\n"
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise LoralignError(f"{path.name} is damaged ({str(error)[:80]}): copy it again") from error
    stored = uniform(products, {name: size[3] for name, size in sizes.items()})
    plain = {f"{PREFIX}{n}.lora_{side}.weight": t for n, f in stored.items() for side, t in (("A", f.A), ("B", f.B))}
    plain |= {key.removeprefix("other|"): t for key, t in tensors.items() if key.startswith("other|")}
    with fresh_folder(Path(out), overwrite=False) as folder, writing(Path(out)):
        save_file({k: t.contiguous().clone() for k, t in plain.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
    return len(stored)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise LoralignError(f"{path} {what}: name the {COMPACT} of an exported folder")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("loralign", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise LoralignError(f"{path} is no readable file of tensors ({str(error)[:80]})") from error
    if not isinstance(meta, dict):
        raise LoralignError(f"{path} is no compact adapter: name the {COMPACT.name} that an export wrote")
    if meta.get("format") != FORMAT:
        raise LoralignError(f"{path} was written by another version of loralign (format {meta.get('format')!r:.20})")
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LoralignError(f"{path} holds NaN or infinite values: it is damaged, copy it again")
    return meta, tensors


def _form(meta: Mapping[str, Any]) -> Form:
    line = METHODS.get(meta["method"])
    if line is None or line.form is None:
        raise LoralignError(f"the compact file is of the method {str(meta['method'])[:40]!r}, which is unknown here")
    form = line.form(**meta["args"])
    if form.facts.version != meta["version"]:
        raise LoralignError(
            f"the compact file is of version {str(meta['version'])[:20]} of {line.id}, this is version "
            f"{form.facts.version}: expand it with the loralign that wrote it"
        )
    return form


def _live(form: Form, name: str, size: tuple[int, int, int, float], tensors: Mapping[str, Tensor]) -> Live:
    r, d_out, d_in, _ = size
    W = Weight(name, (d_out, d_in), lambda: torch.zeros(d_out, d_in))
    draw = draw_for(0, name)
    shapes = {n: t.shape for part in (form.trained, form.constants) for n, t in part(W, r, draw).items()}
    sides = {"A": torch.zeros(r, d_in), "B": torch.zeros(d_out, r)}
    shapes |= {side: sides[side].shape for side in form.facts.stock}
    found = {key: tensors[f"{key}|{name}"] for key in shapes}
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise ValueError(f"{key} of {name} has shape {tuple(found[key].shape)}, not {tuple(shape)}")
    A, B = (found.pop(side, sides[side]) for side in "AB")
    return Live(A, B, A[:0], B[:, :0], found)


def _products(
    form: Form, live: Mapping[str, Live], sizes: Mapping[str, tuple[int, int, int, float]]
) -> Iterator[tuple[str, Product]]:
    for name, own in live.items():
        others = [live[n] for n in form.neighbours(name, list(live))]
        A, B = (factor.dense().float() for factor in form.factors(own, others))
        yield name, Product(A, B * sizes[name][3])
