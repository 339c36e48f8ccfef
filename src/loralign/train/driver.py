"""What happens between optimizer steps: rules act, episodes end and begin; their state, for checkpoints.

driver = drive(model, recipe, opt, total_steps)      # a loop of one's own: this line, and the next after opt.step()
driver.after_step()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from loralign.carrier.sites import sites
from loralign.carrier.slot import constants_of, form_of, live_of, shared_of, trained_of, whole, write
from loralign.carrier.storage import SlotLinear
from loralign.evidence.inputs import InputTap
from loralign.io.described import described
from loralign.maths.bounds import Count
from loralign.maths.given import checked
from loralign.optim.masks import DeadSlots
from loralign.optim.pairs import PairOptimizer
from loralign.plan.course import check_length, idle
from loralign.train.episodes import Episodes, Gather
from loralign.train.events import OFTEN, agreed, apply_plan
from loralign.train.stage import Stage
from loralign.types import Facts, Inputs, LoralignError, Recipe, WorkFailed

log = logging.getLogger("loralign")

Observe = Callable[[], Mapping[str, Any]]
"""What rules may need beyond values and gradients: fields of `Moment` (losses, inputs)."""


class Driver:
    """One run of one recipe, between its optimizer steps."""

    def __init__(
        self,
        recipe: Recipe,
        model: PeftModel,
        optimizer: PairOptimizer,
        *,
        gather: Gather | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.episodes = Episodes(recipe, model, gather)
        self.observe = observe or dict
        wants_inputs = any(isinstance(rule.needs, Inputs) for rule in recipe.rules)
        self.inputs = InputTap(model, list(optimizer.sites.values())) if wants_inputs else None
        self.step, self.total_steps = 0, 0
        self.started = 0
        """Slots of all sites before the first step, where a rule decides about them."""
        self.facts = [rule.facts for rule in recipe.rules]
        self.acted = [False] * len(recipe.rules)
        """Whether a rule planned something yet, be it that nothing is to be done."""
        self.changes: list[tuple[int, int]] = []
        """(step, sites) of every plan that was carried out in this process."""
        optimizer.driven = True

    def begin(self, total_steps: int, *, step: int = 0, episode: int = 0, episode_start: int = 0) -> None:
        """Before the first step, or before the first one after a resume, whose state `load` brings."""
        check_length(self.recipe, total_steps)
        self.total_steps = total_steps
        self.step = step
        if self.inputs is not None:
            self.inputs.place()
        self.episodes.begin(total_steps, self.optimizer, episode, episode_start)
        self.optimizer.begin_link(episode_start, self._link_steps)
        if step == 0:
            self._rules_begin()

    @property
    def _link_steps(self) -> int:
        """Of the run of the rules: a link of a chain, or the whole run."""
        current = self.episodes.current
        return self.total_steps if current is None else min(current.steps, self.total_steps - self.episodes.started)

    def _rules_begin(self) -> None:
        """Before the first step of a link."""
        self.acted = [False] * len(self.facts)
        self._rules_act(self.step)
        self.started = sum(self.ranks().values()) if self.allocates else 0

    def before_step(self, course: Callable[[int], float] | None = None) -> None:
        self.optimizer.lr_factor = self.episodes.lr_factor(self.step, course)

    def after_optimizer_step(self) -> None:
        """Gradients are still there: rules look and act."""
        self._rules_act(self.step + 1)

    def after_step(self) -> None:
        """One optimizer step is done: rules act, and a knot is tied where an episode is over."""
        if self.step >= self.total_steps and self.optimizer.between:
            raise LoralignError(
                f"the run was to have {self.total_steps} steps, by which {self.recipe.name} is timed, and goes on: "
                "give drive() the steps that it will have"
            )
        self.after_optimizer_step()
        self.end_step(self.step + 1)
        self.before_step()

    def skipped_step(self) -> None:
        """The optimizer took no step (a gradient overflowed): what was seen for it is forgotten."""
        if self.inputs is not None:
            self.inputs.taken()

    def close(self) -> None:
        """The run is over: take hooks off the model."""
        if self.inputs is not None:
            self.inputs.remove()

    def ranks(self) -> dict[str, int]:
        """Slots by site that are neither dead nor unborn, nor switched off by a gate that is zero; none where a site
        sleeps. Before the first step of a link zero is where gates start, and switches nothing off."""
        found, moved = {}, self.optimizer.steps_in_link > 0
        for site in sites(self.model):
            form, own = form_of(site.layer, site.adapter), trained_of(site.layer, site.adapter)
            on = ~self.optimizer.dead.get(site.name, torch.zeros(site.r, dtype=torch.bool))
            for name in form.facts.switches if form is not None and moved else ():
                on = on & whole(own[name].detach()).ne(0).cpu()
            found[site.name] = int(on.sum()) if site.name not in self.optimizer.asleep else 0
        return found

    @property
    def allocates(self) -> bool:
        return any(facts.allocates for facts in self.facts)

    def summary(self) -> str:
        """What became of the budget of slots."""
        ranks = self.ranks()
        alive = sum(r > 0 for r in ranks.values())
        return f"budget {self.started} → {sum(ranks.values())} slots: {alive} of {len(ranks)} modules alive"

    def end_step(self, step: int) -> None:
        self.step = step
        self._check_schedules()
        if self.episodes.after_step(step, self.optimizer):
            self.optimizer.begin_link(self.optimizer.steps, self._link_steps)
            self._rules_begin()

    def unfinished(self) -> str:
        """What to say of a rule whose schedule has not come to its end; "" where all have."""
        taken = self.optimizer.steps_in_link
        for by in map(self._acts_by, self.facts):
            if taken < by:
                return f"{self.recipe.name}: its schedule acts until step {by}, and {taken} were taken"
        return ""

    def _acts_by(self, facts: Facts) -> int:
        return facts.acts_by(self._link_steps) if facts.acts_by else 0

    def _check_schedules(self) -> None:
        """Raise as soon as a rule did not act when it was to, or cannot any more because steps were skipped."""
        taken = self.optimizer.steps_in_link
        seen = self.step - self.episodes.started
        left = self._link_steps - seen
        for facts, acted in zip(self.facts, self.acted, strict=True):
            by = self._acts_by(facts)
            if by and taken >= by and not acted:
                raise WorkFailed(f"{self.recipe.name}: its schedule was to act by step {by}, and nothing happened")
            if by > taken + left:
                raise WorkFailed(
                    f"{self.recipe.name}: gradients overflowed at {seen - taken} of {seen} steps, so the "
                    f"{by} steps that its schedule needs are out of reach: train in bf16 or fp32, or longer"
                )

    @torch.no_grad()
    def _rules_act(self, step: int) -> None:
        seen = dict(self.observe())
        if self.inputs is not None:
            seen["inputs"] = self.inputs.taken()
        self.optimizer.untold = 0
        for i, rule in enumerate(self.recipe.rules):
            state = self.optimizer.rule_states[i]
            moment = self.optimizer.moment(**seen)
            try:
                state, plan = rule.step(state, moment)
            except WorkFailed:
                self.optimizer.norms.check()  # says it better where the gradient is to blame
                raise
            self.optimizer.rule_states[i] = state
            self.acted[i] |= plan is not None and moment.step > 0
            if self.facts[i].events and (verbs := agreed(plan)):
                often = all(isinstance(verb, OFTEN) for verb in verbs)
                if not often:  # what an event changes, nobody puts back
                    self.optimizer.norms.check()
                stage = Stage(self.optimizer, state, self.recipe.seed, step)
                changed = apply_plan(stage, verbs)
                self.changes.append((step, len(changed)))
                said = "%s: slots changed at %d sites after step %d"
                log.log(logging.DEBUG if often else logging.INFO, said, self.recipe.name, len(changed), step)
            elif plan:
                raise WorkFailed(f"{type(rule).__name__} planned an event, but its facts say that it has none")

    # ----------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """What cannot be read from A and B of a checkpoint; call it on every rank, sharded tensors are gathered."""
        found = {f"dead|{name}": mask for name, mask in self.optimizer.dead.items()}
        if self.recipe.rules:
            found["taken"] = torch.tensor(self.optimizer.link.taken)
        if self.allocates:
            found["started"] = torch.tensor(self.started)
        scheduled = [i for i, facts in enumerate(self.facts) if facts.acts_by]
        found |= {f"acted|{i}": torch.tensor(self.acted[i]) for i in scheduled}
        for i, state in enumerate(self.optimizer.rule_states):
            found |= {f"rule|{i}|{key}": whole(value) for key, value in state.items()}
        found |= {f"shared|{name}": whole(value) for name, value in shared_of(self.model).items()}
        for site in sites(self.model):
            live, head = live_of(site.layer, site.adapter), f"live|{site.name}|"
            if live.links:
                found[f"links|{site.name}"] = torch.tensor(live.links)
            if _owned(site.layer, site.adapter):
                found |= {
                    f"{head}A": whole(live.A),
                    f"{head}B": whole(live.B),
                    f"{head}A0": live.A0,
                    f"{head}B0": live.B0,
                }
            found |= {f"{head}extra|{key}": whole(value) for key, value in live.own.items()}
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.dead = DeadSlots({k[5:]: mask.clone() for k, mask in state.items() if k.startswith("dead|")})
        self.started = int(state.get("started", sum(shape.r for shape in self.optimizer.shapes)))
        taken = int(state.get("taken", self.episodes.started))  # older checkpoints do not say
        self.optimizer.link = self.optimizer.link._replace(taken=taken)
        for i, acted in enumerate(self.acted):
            self.acted[i] = acted or bool(state.get(f"acted|{i}", True))  # older checkpoints do not say
            head = f"rule|{i}|"
            kept = {k.removeprefix(head): v.clone() for k, v in state.items() if k.startswith(head)}
            self.optimizer.rule_states[i] |= kept
        for name, value in shared_of(self.model).items():
            write(value, self._needed(state, f"shared|{name}"))
        for site in sites(self.model):
            self._load_site(site.name, site.layer, site.adapter, state)

    def _load_site(self, name: str, layer: Any, adapter: str, state: Mapping[str, Tensor]) -> None:
        head = f"live|{name}|"
        kept = state.get(f"links|{name}")
        layer.lora_variant[adapter].links = tuple(kept.tolist()) if kept is not None else ()
        if _owned(layer, adapter):
            for side in "AB":
                module = getattr(layer, f"lora_{side}")[adapter]
                write(module.live, self._needed(state, f"{head}{side}"))
                module.frozen = self._needed(state, f"{head}{side}0").to(module.frozen)
        for key, value in {**trained_of(layer, adapter), **constants_of(layer, adapter)}.items():
            write(value, self._needed(state, f"{head}extra|{key}"))

    def _needed(self, state: Mapping[str, Tensor], key: str) -> Tensor:
        if key not in state:
            where = key.split("|")[1] or "the model"
            raise LoralignError(f"the checkpoint lacks the live tensors of {where}: its loralign_state file is missing")
        return state[key]


def _owned(layer: Any, adapter: str) -> bool:
    """The form of this layer folds A and B into what the adapter's file cannot hand back."""
    side, form = layer.lora_A[adapter], form_of(layer, adapter)
    return isinstance(side, SlotLinear) and side.owner is not None and form is not None and bool(form.facts.stock)


@checked
def drive(
    model: PeftModel,
    recipe: Recipe,
    optimizer: PairOptimizer,
    total_steps: Count,
    *,
    gather: Gather | None = None,
    observe: Observe | None = None,
) -> Driver:
    """The driver of a loop of one's own; call its `after_step()` after every `optimizer.step()`.

    Args:
        total_steps: optimizer steps of the whole run, which schedules of rules and episodes are measured in.
        gather: (episode) -> evidence, where a link of a chain starts from data.
        observe: () -> what rules that need validation losses or inputs must see.
    Example:
        >>> from loralign import adapt, build, drive, optimizer
        >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> recipe = build("delta-lora", {"wait_steps": 1}, r=2)
        >>> model = adapt(LlamaForCausalLM(LlamaConfig(**sizes)), recipe)
        >>> opt = optimizer(model, recipe, lr=1e-3); driver = drive(model, recipe, opt, total_steps=3)
        >>> for _ in range(3):
        ...     ids = torch.ones(1, 4, dtype=torch.long)
        ...     model(input_ids=ids, labels=ids).loss.backward(); opt.step(); driver.after_step()
        >>> driver.changes
        [(2, 7)]
    """
    if optimizer.driven:
        raise LoralignError("this optimizer has a driver already: build a new optimizer for another run")
    for part, has in (("rules", optimizer.rules), ("transform", optimizer.transform)):
        if dict(described(has, part)) != dict(described(getattr(recipe, part), part)):
            raise LoralignError(f"the optimizer has other {part} than {recipe.name}: build it with this recipe")
    if said := idle(recipe, total_steps):
        log.warning("%s", said)
    driver = Driver(recipe, model, optimizer, gather=gather, observe=observe)
    driver.begin(total_steps)
    driver.before_step()
    return driver
