"""Which layers of a block get a LoRA, which stay frozen, and what share of the weights that is.

Every linear layer gets one, and so do the experts of a mixture, each expert its own (mlx-lm's
switch layers). Frozen stay:

- routers, the linear layers that choose among the experts: a policy that routes differently while
  it samples than while it learns has another ratio for reasons that no reward gave;
- multi-head latent projections (mlx-lm's MultiLinear), for which mlx-lm has no LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import share
from mlx_grpo.models.families import gemma3n

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
LATENT = (MultiLinear, QuantizedMultiLinear)
ROUTERS = ("router", "classifier")
"""Parts of names that nothing but routers have in mlx-lm."""
GATES = ("gate", "wg")
"""In other routers' names, and in those of layers that are none."""


@dataclass(frozen=True)
class Coverage:
    """Weights of all blocks, by what becomes of them."""

    adapted: int
    """Of linear layers with a LoRA."""
    experts: int
    """Of experts."""
    routers: int
    latent: int
    rest: int
    """Norms, convolutions, biases and the like."""
    router_layers: int
    latent_layers: int

    @property
    def total(self) -> int:
        return self.adapted + self.experts + self.routers + self.latent + self.rest

    def share(self, expert_rank: int) -> float:
        """Share of the blocks' weights that have a LoRA."""
        return (self.adapted + bool(expert_rank) * self.experts) / max(1, self.total)

    def describe(self, expert_rank: int) -> str:
        """One line: where a LoRA is, and what stays frozen."""
        experts = f"experts at rank {expert_rank}" if expert_rank else "experts frozen"
        parts = [
            f"on {self.share(expert_rank):.0%} of the blocks' weights",
            experts if self.experts else "",
            _frozen(self.router_layers, "router"),
            _frozen(self.latent_layers, "latent projection"),
        ]
        return ", ".join(filter(None, parts))


def _frozen(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)} frozen" if count else ""


def lora_keys(model: nn.Module, experts: bool = True) -> list[str]:
    """Names within a block of the layers that get a LoRA, sorted; mlx-lm's `keys`.

    Args:
        experts: whether those of mixtures are among them.
    """
    kinds = (*LINEAR, *EXPERTS) if experts else LINEAR
    return sorted(
        {
            name
            for block in model.layers
            for name, module in block.named_modules()
            if isinstance(module, kinds) and _kind(name, module, block) in ("adapted", "experts")
        }
    )


def targeted(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Those of a block's layers that a target names, whole (`self_attn.q_proj`) or by its
    last parts (`q_proj`), as PEFT's `target_modules` do; all of them if there are no targets.

    Raises:
        InputError: a target that names none.
    """
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise InputError(f"--lora-target-modules: no layer '{target}'; this model has {known}")
    return [n for n in names if not targets or any(f".{n}".endswith(f".{t}") for t in targets)]


def adapted_layers(model: nn.Module, targets: Sequence[str] = ()) -> list[nn.Module]:
    """The layers of all blocks that get a LoRA, experts among them; those of `targets` if given.

    Raises:
        InputError: a target that names none.
    """
    keys = targeted(lora_keys(model), targets)
    return [
        module
        for block in model.layers
        for name, module in block.named_modules()
        if name in keys and isinstance(module, (*LINEAR, *EXPERTS))
    ]


def experts_per_token(model: nn.Module) -> int:
    """How many experts of a mixture work on a token; 0 where there are none.

    Families call the setting by a dozen names, so the experts themselves are asked: one token runs
    through the model, lazily, and they note how many indices they are given.
    """
    seen: list[int] = []

    def watched(module: nn.Module) -> nn.Module:
        module.__class__ = type("Watched", (type(module),), {"__call__": note})
        return module

    def note(self: nn.Module, x: mx.array, indices: mx.array, **kwargs: bool) -> mx.array:
        seen.append(indices.size)
        found: mx.array = type(self).__mro__[1].__call__(self, x, indices, **kwargs)
        return found

    if not any(isinstance(m, EXPERTS) for m in adapted_layers(model)):
        return 0
    twin = share(model)
    for module in adapted_layers(twin):
        if isinstance(module, EXPERTS):
            watched(module)
    twin(mx.zeros((1, 1), mx.int32))
    return max(seen, default=0)


def coverage(model: nn.Module) -> Coverage:
    """What a LoRA reaches of a model without one; from shapes alone."""
    sizes = dict.fromkeys(("adapted", "experts", "routers", "latent"), 0)
    layers, total = dict.fromkeys(sizes, 0), 0
    for block in model.layers:
        total += sum(_values(m) for _, m in block.named_modules())
        for name, module in block.named_modules():
            if kind := _kind(name, module, block):
                sizes[kind] += weight_count(module)
                layers[kind] += 1
    rest = total - sum(sizes.values())
    return Coverage(
        **sizes, rest=rest, router_layers=layers["routers"], latent_layers=layers["latent"]
    )


def _kind(name: str, module: nn.Module, block: nn.Module) -> str | None:
    if name in gemma3n.WITHOUT_LORA:
        return None
    if _routes(name, module, block):
        return "routers"
    if isinstance(module, LINEAR):
        return "adapted"
    if isinstance(module, EXPERTS):
        return "experts"
    return "latent" if isinstance(module, LATENT) else None


def _routes(name: str, module: nn.Module, block: nn.Module) -> bool:
    """Whether a layer gives a score to each expert of its block; by its name, or by its outputs
    where the name does not tell."""
    if module.get("weight") is None:
        return False
    if any(part in ROUTERS for part in name.split(".")):
        return True
    if not any(part in name for part in GATES):
        return False
    counts = {m.weight.shape[0] for _, m in block.named_modules() if isinstance(m, EXPERTS)}
    return module.weight.ndim == 2 and module.weight.shape[0] in counts


def weight_count(module: nn.Module) -> int:
    """Weights of a layer, packed ones counted one by one."""
    size: int = module.weight.size
    return size * 32 // module.bits if "scales" in module else size


def _values(module: nn.Module) -> int:
    """Weights that a module itself holds, without those of its parts."""
    own = {n: v for n, v in module.items() if not isinstance(v, nn.Module | list | dict)}
    if "scales" in own:
        return weight_count(module) + (own["bias"].size if "bias" in own else 0)
    return sum(v.size for _, v in tree_flatten(own) if hasattr(v, "size"))
