"""PairOptimizer: one optimizer for pairs (A, B) under any transform and rules, and for everything else under AdamW.

    gradients → + penalty gradients → clip (global norm) → gradient masks → transform → decay → update masks → apply

Tensors are looked up in `param_groups` at every step (FSDP2 replaces Parameters), state is keyed by tensor and holds
tensors only, so `torch.load(weights_only=True)` reads it back. Learning rates live in the groups: any scheduler works,
and lr of B over lr of A is the transform's `lr_ratio` at every step. Weight decay is decoupled and acts on the live
tensors, so a twin's decay pulls W_eff towards W0; it comes before the update masks, so masked slots do not decay.

A pair's values are A and B themselves; for a twin A0 + ΔA and B0 + ΔB. Updates are added to the live tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralign.carrier.slot import SlotLinear, live_of, whole
from loralign.maths.draws import keyed_generator
from loralign.maths.lists import LateMapping, LateSequence, adam_state, adam_updates, masked
from loralign.optim.groups import groups
from loralign.optim.shards import add_, wholes
from loralign.types import (
    Ctx,
    Grad,
    Moment,
    Pair,
    Rule,
    Site,
    SlotPlan,
    State,
    Train,
    Transform,
    WorkFailed,
)


class PairOptimizer(torch.optim.Optimizer):
    """AdamW's drop-in for adapters.

    Args:
        sites: the adapted sites; their trained factors form the pairs.
        rest: other trainable tensors by name (heads, norms, embeddings, a form's extra tensors): AdamW.
        lr: learning rate of A and of the rest; B's is lr·transform.lr_ratio.
        rest_lr: learning rate of the rest where it differs (a fresh head), else None.
        max_grad_norm: global clip over all trained tensors, 0 = off.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        rest: Mapping[str, nn.Parameter],
        transform: Transform,
        *,
        rules: Sequence[Rule] = (),
        lr: float = 1e-3,
        rest_lr: float | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self._modules: dict[str, dict[str, Any]] = {
            site.name: {side: getattr(site.layer, f"lora_{side}")[site.adapter] for side in "AB"} for site in sites
        }
        self.transform, self.rules = transform, tuple(rules)
        self.elementwise = "sharded" in transform.accepts and not self.rules
        """Nobody needs whole factors, so sharded ones stay apart."""
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.dead: dict[str, Tensor] = {}
        """Slots that never train, by site: bool (r,), True = dead."""
        self.asleep: set[str] = set()
        """Sites that sit out this episode."""
        self.reached: set[str] = set()
        """Sites that ever received an update."""
        self.applied, self.steps_here, self.grad_norm, self.lr_factor = 0, 0, float("nan"), 1.0
        made = groups(sites, rest, transform, lr, rest_lr, weight_decay)
        super().__init__(made, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep the precision they were saved in (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        saved = (k for group in state_dict["param_groups"] for k in group["params"])
        mine = (p for group in self.param_groups for p in group["params"])
        for k, p in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(k, {}).items():
                self.state[p][key] = value.detach().to(p.device, copy=True)

    # --------------------------------------------------------------------------------------------------------- one step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.param_groups[0]["step"] = self.param_groups[0].get("step", 0) + 1
        live = self._live()
        pairs = self._pairs({name: factors for name, factors in live.items() if name not in self.asleep})
        ctx = self._ctx({})
        self._penalise(live, pairs, ctx)
        norm = self._clip()
        grads = self._grads(live, pairs)
        pairs = [p for p in pairs if any(g is not None for g in grads[p.name])]
        if not pairs:
            self._checked(norm)
            raise WorkFailed(
                "no pair of the adapter received a gradient, so nothing was trained: "
                "is the loss computed from the adapted model?"
            )
        grads = masked(grads, pairs, [rule.grad_mask(pairs, ctx) for rule in self.rules])
        try:
            updates = self._decayed(self._transformed(pairs, grads, live), live)
        except torch.linalg.LinAlgError:
            self._checked(norm)  # says it better where the gradient is to blame
            raise
        updates = masked(updates, pairs, [*(rule.update_mask(pairs, ctx) for rule in self.rules), self._alive(pairs)])
        self._checked(norm)  # here and no earlier: until now the device works on while the host prepares its next calls
        self._apply(live, updates)
        self._step_rest()
        self.applied, self.steps_here = len(pairs), self.steps_here + 1
        self.reached |= {p.name for p in pairs}
        return loss

    def _live(self) -> dict[str, dict[str, nn.Parameter]]:
        found: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.sites}
        for group in self.param_groups:
            if group["role"] in "AB":
                for name, p in zip(group["names"], group["params"], strict=True):
                    found[name][group["role"]] = p
        return {name: factors for name, factors in found.items() if factors}

    def _pairs(self, live: Mapping[str, Mapping[str, nn.Parameter]]) -> list[Pair]:
        """The present values of these sites' factors; those of twins are sums, formed in one call per side."""
        found: dict[str, list[Tensor]] = {"A": [], "B": []}
        twins: dict[str, list[tuple[int, Tensor]]] = {"A": [], "B": []}
        for k, (name, factors) in enumerate(live.items()):
            sides = self._modules[name]
            twin = isinstance(sides["B"], SlotLinear) and sides["B"].kind == "T"
            for role, values in found.items():
                p = factors.get(role)
                values.append((sides[role]._parameters["weight"] if p is None else p).data)
                if twin:
                    twins[role].append((k, sides[role].frozen))
        if not self.elementwise:
            both = wholes([*found["A"], *found["B"]])
            found = {"A": both[: len(live)], "B": both[len(live) :]}
        for role, frozen in twins.items():
            if frozen:
                sums = torch._foreach_add([found[role][k] for k, _ in frozen], [t for _, t in frozen])
                for (k, _), value in zip(frozen, sums, strict=True):
                    found[role][k] = value
        made = []
        for (name, factors), A, B in zip(live.items(), found["A"], found["B"], strict=True):
            train: Train = "AB" if len(factors) == 2 else "A" if "A" in factors else "B"
            made.append(Pair(name, A, B, self.sites[name].s, train))
        return made

    def _grads(self, live: Mapping[str, Mapping[str, nn.Parameter]], pairs: Sequence[Pair]) -> dict[str, Grad]:
        found = {(p.name, f): q.grad for p in pairs for f, q in live[p.name].items() if q.grad is not None}
        if not self.elementwise:
            found = dict(zip(found, wholes(list(found.values())), strict=True))
        return {p.name: Grad(found.get((p.name, "A")), found.get((p.name, "B"))) for p in pairs}

    def _ctx(self, scalars: Mapping[str, Tensor]) -> Ctx:
        rate = {g["role"]: float(g["lr"]) * self.lr_factor for g in self.param_groups}
        step, seed = int(self.param_groups[0]["step"]), self.seed
        return Ctx(
            rate.get("A", 0.0),
            rate.get("B", 0.0),
            step,
            scalars,
            lambda purpose, name: keyed_generator(seed, purpose, step, name),
        )

    def _penalise(self, live: Mapping[str, Mapping[str, nn.Parameter]], pairs: Sequence[Pair], ctx: Ctx) -> None:
        for rule in self.rules:
            penalties = zip(pairs, rule.penalty_grad(pairs, ctx) or (), strict=False)
            found = [(p.grad, getattr(g, f)) for pair, g in penalties for f, p in live[pair.name].items()]
            todo = [(grad, extra) for grad, extra in found if grad is not None and extra is not None]
            if todo:
                add_(*zip(*todo, strict=True))

    def _clip(self) -> Tensor | None:
        """Scale all gradients to at most the norm allowed; returns their norm, on the device as long as nobody asks."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return None
        kinds: dict[Any, list[Tensor]] = {}
        for grad in grads:
            kinds.setdefault((grad.device, getattr(grad, "placements", None)), []).append(grad)
        parts = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(kind))) for kind in kinds.values()]
        if len(parts) == 1 and not isinstance(parts[0], DTensor):
            norm = parts[0]
        else:
            norm = torch.linalg.vector_norm(torch.stack([whole(part).to(grads[0].device) for part in parts]))
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for (device, placements), kind in kinds.items():
                torch._foreach_mul_(kind, scale.to(device) if placements is None else float(scale))
        return norm

    def _checked(self, norm: Tensor | None) -> None:
        """Keep the norm. Not finite: drop the moments, which have seen it, and raise before any factor moves."""
        if norm is None:
            return
        self.grad_norm = norm.item()
        if not math.isfinite(self.grad_norm):
            self.state.clear()
            raise WorkFailed(
                f"the gradient is not finite at step {self.param_groups[0]['step']} (norm {self.grad_norm}): "
                "lower the learning rate, or look for broken rows in the data"
            )

    def _transformed(
        self, pairs: Sequence[Pair], grads: Mapping[str, Grad], live: Mapping[str, Mapping[str, nn.Parameter]]
    ) -> dict[str, Grad]:
        batches: dict[Any, list[Pair]] = {}
        mixed = "shapes" in self.transform.accepts
        for pair in pairs:
            g = grads[pair.name]
            shape = pair.A.shape[0] if mixed else (pair.A.shape, pair.B.shape)
            key = (shape, pair.train, pair.A.device, g.A is None, g.B is None)
            batches.setdefault(key, []).append(pair)
        state = {pair.name: self._state(pair, live[pair.name]) for pair in pairs}
        ctx, scalars = self._ctx({}), dict[str, Tensor]()
        for batch in batches.values():
            part = self.transform.measure([grads[p.name] for p in batch], [state[p.name] for p in batch], batch, ctx)
            for scalar, value in part.items():
                scalars[scalar] = scalars[scalar] + value if scalar in scalars else value
        ctx, updates = self._ctx(scalars), dict[str, Grad]()
        for batch in batches.values():
            made = self.transform.update([grads[p.name] for p in batch], [state[p.name] for p in batch], batch, ctx)
            updates.update({p.name: u for p, u in zip(batch, made, strict=True)})
        return updates

    def _state(self, pair: Pair, live: Mapping[str, nn.Parameter]) -> State:
        state = {factor: self.state[p] for factor, p in live.items()}
        missing = [factor for factor, kept in state.items() if not kept]
        if missing:
            fresh = self.transform.init(pair)
            for factor in missing:
                state[factor].update(fresh.get(factor, {}))
        return state

    def _alive(self, pairs: Sequence[Pair]) -> Sequence[Grad] | None:
        if not self.dead:
            return None
        masks = []
        for pair in pairs:
            alive = ~self.dead[pair.name] if pair.name in self.dead else None
            on = None if alive is None else alive.to(pair.A.device, pair.A.dtype)
            masks.append(Grad(None if on is None else on[:, None], on))
        return masks

    def _decayed(self, updates: dict[str, Grad], live: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, Grad]:
        """updates − lr·decay·p, for the factors that have an update."""
        rate = {g["role"]: float(g["lr"]) * self.lr_factor * float(g["weight_decay"]) for g in self.param_groups}
        for factor in (f for f in "AB" if rate.get(f)):
            names = [n for n, u in updates.items() if getattr(u, factor) is not None]
            if not names:
                continue
            now = [getattr(updates[n], factor) for n in names]
            ps: list[Tensor] = [live[n][factor].data for n in names]
            ps = ps if self.elementwise else wholes(ps)
            made = torch._foreach_add(now, [p.to(u.dtype) for p, u in zip(ps, now, strict=True)], alpha=-rate[factor])
            updates.update({n: updates[n]._replace(**{factor: u}) for n, u in zip(names, made, strict=True)})
        return updates

    def _apply(self, live: Mapping[str, Mapping[str, nn.Parameter]], updates: Mapping[str, Grad]) -> None:
        for factor in "AB":
            rows = [(live[n][factor], getattr(u, factor)) for n, u in updates.items() if factor in live[n]]
            todo = [(p, u) for p, u in rows if u is not None]
            if todo:
                add_(*zip(*todo, strict=True))

    def _step_rest(self) -> None:
        for group in self.param_groups:
            todo = [p for p in group["params"] if p.grad is not None] if group["role"] == "rest" else []
            if not todo:
                continue
            for p in todo:
                if not self.state[p]:
                    self.state[p].update(adam_state(p))
            made = adam_updates([p.grad for p in todo], [self.state[p] for p in todo], float(group["lr"]))
            if group["weight_decay"]:
                torch._foreach_mul_(todo, 1 - float(group["lr"]) * float(group["weight_decay"]))
            torch._foreach_add_(todo, [u.to(p.dtype) for u, p in zip(made, todo, strict=True) if u is not None])

    def moment(self, total_steps: int) -> Moment:
        """What rules see after a step: pairs with their new values, the gradients of this step, the dead slots.

        Made when a rule reads it, so read it before the next step, and under FSDP2 on every rank or on none.
        """
        live = self._live()
        pairs = LateSequence(lambda: self._pairs(live))
        grads = LateMapping(lambda: self._grads(live, pairs))
        extra = LateMapping(lambda: {n: dict(live_of(s.layer, s.adapter).extra) for n, s in self.sites.items()})
        dead = {n: frozenset(mask.nonzero().flatten().tolist()) for n, mask in self.dead.items()}
        ctx = self._ctx({})
        return Moment(ctx.step, total_steps, pairs, grads, extra, dead, ctx.draw)

    def on_plan(self, name: str, plan: SlotPlan) -> None:
        """Let the transform adjust the state of one site whose slots changed."""
        live = self._live().get(name)
        if live and all(self.state[p] for p in live.values()):
            self.transform.on_plan(self._pairs({name: live})[0], {f: self.state[p] for f, p in live.items()}, plan)

    def forget(self, names: Iterable[str]) -> None:
        """Clear the whole optimizer state (moments and step counters) of these sites, as a knot of a chain needs."""
        live = self._live()
        for name in names:
            for p in live.get(name, {}).values():
                self.state.pop(p, None)
