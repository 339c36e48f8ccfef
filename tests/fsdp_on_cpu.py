"""`loralign …` under accelerate's FSDP2 on CPUs (gloo), which accelerate itself starts on accelerators only.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py train recipe.yaml …
"""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip
"""As `accelerate launch --use_fsdp --fsdp_version 2` asks, which has that loading on."""


def allow() -> None:
    """After accelerate's own choice: several processes on CPUs are FSDP's."""
    ours = accelerate.state.AcceleratorState
    begin = ours.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does

    ours.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    os.environ |= ASKED  # here: pytest imports this file for its doctests
    allow()
    from loralign.cli.app import main

    sys.exit(main(sys.argv[1:]))
