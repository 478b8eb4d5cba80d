"""SAN's variants: SAN without one of its parts, or with what it might need beside them.

`train_vision.py --ablation` compares them. FLAGS sets a variant's flags, CHANGES what it does to
the adapted model. [C] the authors' v1 code, [us] our choice.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

import san
from lab.methods import SECOND

PULL = 0.01  # [us] Adam sees it beside gradients of about 1e-3 to 1e-2 per γ


class Exponential(nn.Module):
    """γ = exp(s): positive always, and a step of s scales γ by the same factor at 0.1 and at 10."""

    def forward(self, s: Tensor) -> Tensor:
        return s.exp()

    def right_inverse(self, gamma: Tensor) -> Tensor:
        return gamma.log()


def exponential(model: nn.Module) -> None:
    """Train s of γ = exp(s) in place of every γ; where γ = 1, s = 0."""
    for layer in san_layers(model).values():
        parametrize.register_parametrization(layer, "gamma", Exponential())


def pulled(model: nn.Module) -> None:
    """Add PULL / 2 · ‖γ − 1‖² to the loss, by its gradient PULL · (γ − 1)."""
    for layer in san_layers(model).values():
        layer.gamma.register_hook(
            lambda gradient, gamma=layer.gamma: gradient + PULL * (gamma.detach() - 1)
        )


def propagated_in_mlps(model: nn.Module) -> None:
    """Propagate to an MLP's last layer alone, where γ' makes functions that scaling cannot."""
    for name, layer in san_layers(model).items():
        if not name.endswith(SECOND):
            layer.anterior, layer.index = (), None


def san_layers(model: nn.Module) -> dict[str, san.SANLayer]:
    """Name → SAN layer."""
    return {name: m for name, m in model.named_modules() if isinstance(m, san.SANLayer)}


SAN = {"method": "san", "mode": "both", "shift": True, "norms": True}
SAN |= {"gamma_std": 0.0, "wiring": "san"}
CHANGES = {
    "SAN, γ = exp(s)": exponential,
    "SAN, γ pulled to 1": pulled,
    "SAN, propagated in MLPs alone": propagated_in_mlps,
}
FLAGS = {
    "both, shift (SAN)": SAN,
    "both": SAN | {"shift": False},
    "feature, shift": SAN | {"mode": "feature"},
    "feature": SAN | {"mode": "feature", "shift": False},
    "propagation, shift": SAN | {"mode": "propagation"},
    "propagation": SAN | {"mode": "propagation", "shift": False},
    "SAN, norms frozen": SAN | {"norms": False},
    "both, norms frozen": SAN | {"shift": False, "norms": False},
    "SAN, γ from N(1, 0.02)": SAN | {"gamma_std": 0.02},
    "SAN, authors' wiring": SAN | {"wiring": "authors"},
    "SAN, no warm-up": SAN | {"warmup_epochs": 0.0},
    **dict.fromkeys(CHANGES, SAN),
}
