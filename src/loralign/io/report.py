"""What an export wrote and what it lost, as data and as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loralign.carrier.quantise import kind_of
from loralign.io.folder import COMPACT, GGUF
from loralign.io.layout import Loss
from loralign.io.portable import serving_note
from loralign.io.probes import Difference

_NOTES = {
    "portable": serving_note,
    "gguf": lambda rank: f"`llama-server -m BASE.gguf --lora {GGUF}`, or `ADAPTER ./{GGUF}` in Ollama's Modelfile",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written and what it lost against the trained model."""

    profile: str
    base: str
    revision: str | None
    model_class: str
    task: str | None
    dtype: str
    ranks: Mapping[str, int]
    """Rank by site, padding included; empty for a merged model."""
    exact: bool
    """Nothing was rounded below fp32, truncated or approximated."""
    method_exact: bool
    """A fact about the method: its factors compute the function that training did."""
    truncation: Loss | None = None
    cut_to: int = 0
    """The rank that sites above it were truncated to; padding comes after."""
    rounding: Loss | None = None
    difference: Difference | None = None
    """Logits of the exported model against the trained one's on the probes, where the export is not exact."""
    merged_into: str = ""
    compact: float | None = None
    """Bytes of the compact file over those of the adapter's, where there is one."""
    labels: int | None = None
    """Of a classifier's head, which the adapter holds."""
    quantization: Mapping[str, Any] | None = None
    """By which the base was quantised while it was loaded."""
    traps: tuple[str, ...] = ()
    """What servers would do wrong with this folder (profile portable: none)."""

    @property
    def kind(self) -> str:
        """Of that quantisation, "" where there was none."""
        said = self.quantization
        return "" if said is None else kind_of(said) or str(said.get("quant_method", "other"))

    @property
    def rank(self) -> int:
        return max(self.ranks.values(), default=0)

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        kind = "exact" if self.exact else "with a loss, stated below"
        if self.profile == "merged":
            said = [f"The update is merged into {self.merged_into}."]
        else:
            low, high = min(self.ranks.values()), self.rank
            ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
            said = [f"Plain LoRA, profile {self.profile}, {ranks} on {len(self.ranks)} modules, {self.dtype}; {kind}."]
        if self.kind and self.profile != "merged":
            said.append(
                f"Trained and compared on the base quantised to {self.kind} while it was loaded. Stock PEFT loads the "
                "adapter on the base as it is, too: logits there differ by what was rounded, which nothing here bounds."
            )
        if self.compact is not None:
            said.append(
                f"`{COMPACT}` holds the same in {self.compact:.0%} of the bytes; `loralign expand` writes the plain "
                "adapter from it."
            )
        if not self.method_exact:
            said.append("The method has no exact plain form: this is the paper's own merge.")
        if self.truncation is not None:
            said.append(_loss_line(f"Truncated to rank {self.cut_to}", self.truncation))
        if self.rounding is not None:
            said.append(_loss_line(f"Stored in {self.dtype}", self.rounding))
        if self.difference is not None:
            d = self.difference
            said.append(
                f"Logits on the probes differ from the trained model's by at most {d.largest:.1e} "
                f"({d.mean:.1e} on average, {d.relative:.1e} relative), the top choice agrees in {d.top1:.1%}."
            )
        return said + ([f"To serve it – {_NOTES[self.profile](self.rank)}."] if self.profile in _NOTES else [])


def _loss_line(what: str, loss: Loss) -> str:
    return f"{what}: relative error of the update {loss.total:.1e} in total, {loss.largest:.1e} at the worst module."
