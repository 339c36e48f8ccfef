"""loralign: LoRA that keeps up with full fine-tuning; ships plain PEFT adapters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralign.carrier.sites import factors as factors
    from loralign.carrier.sites import peft_config as peft_config
    from loralign.carrier.sites import sites as sites
    from loralign.io.export import export as export
    from loralign.io.verify import verify as verify
    from loralign.methods.build import build as build
    from loralign.methods.table import METHODS as METHODS
    from loralign.methods.table import learning_rate as learning_rate
    from loralign.train.adapt import adapt as adapt
    from loralign.train.adapt import optimizer as optimizer
    from loralign.train.attach import attach as attach
    from loralign.train.compiled import compile as compile
    from loralign.train.driver import drive as drive
    from loralign.types import Full as Full
    from loralign.types import LoralignError as LoralignError
    from loralign.types import Recipe as Recipe

__version__ = "0.1.0"

_HOMES = {
    "loralign.carrier.sites": ("factors", "peft_config", "sites"),
    "loralign.io.export": ("export",),
    "loralign.io.verify": ("verify",),
    "loralign.methods.build": ("build",),
    "loralign.methods.table": ("METHODS", "learning_rate"),
    "loralign.train.adapt": ("adapt", "optimizer"),
    "loralign.train.attach": ("attach",),
    "loralign.train.compiled": ("compile",),
    "loralign.train.driver": ("drive",),
    "loralign.types": ("Full", "LoralignError", "Recipe"),
}
"""Module to the public names in it. It is imported when one of them is first asked for, so that `loralign --help` does
not wait for torch."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
