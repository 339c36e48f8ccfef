"""loralign: LoRA that keeps up with full fine-tuning; ships plain PEFT adapters."""

from loralign.carrier.sites import factors as factors
from loralign.carrier.sites import peft_config as peft_config
from loralign.carrier.sites import sites as sites
from loralign.io.export import export as export
from loralign.io.verify import verify as verify
from loralign.methods.table import METHODS as METHODS
from loralign.methods.table import build as build
from loralign.methods.table import learning_rate as learning_rate
from loralign.train.adapt import adapt as adapt
from loralign.train.adapt import optimizer as optimizer
from loralign.train.attach import attach as attach
from loralign.types import Full as Full
from loralign.types import LoralignError as LoralignError
from loralign.types import Recipe as Recipe

__version__ = "0.1.0"
