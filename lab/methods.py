"""What SAN is compared with: each method is what it trains, and folds into plain layers again.

`adapt` prepares a model for a method, `fold` makes plain layers of it.
[P] the paper, [C] the authors' v1 code, [S] SSF, [us] our choice, as in san.py.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import models
import san

# where the papers compared with LoRA and DoRA put them in a LLaMA (the setting of LLM-Adapters)
LOW_RANK = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# SAN's ablation [C]: both uses of γ, feature scaling alone, propagation alone
MODES = {"both": {}, "feature": {"propagate": False}, "propagation": {"scale": False}}
UNLINKED = ("linear", "bias", "vpt", "full")  # methods that know nothing of links


class LoRALayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d plus a trained update of low rank: W + (α/r) B A.

    B: out×r, zeros at the start; A: r×(all inputs of one output), Kaiming-uniform (Hu et al. 2022).
    A convolution's kernel counts as a matrix, out × in/groups·kh·kw. x and output: as the layer's.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        weight = layer.weight
        # float32 at least, as γ: steps would be lost to half precision's rounding
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.layer = layer
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight[0].numel(), dtype=wide))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank, dtype=wide))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + self.low_rank(x)
        weight = self.weight.to(self.layer.weight.dtype)
        return self.layer._conv_forward(x, weight, self.layer.bias)

    def low_rank(self, x: Tensor) -> Tensor:
        """(α/r) B A x by two thin products, never the full update."""
        return ((x.to(self.a.dtype) @ self.a.T) @ self.b.T * self.scale).to(x.dtype)

    def update(self) -> Tensor:
        """(α/r) B A in the weight's shape."""
        return ((self.b @ self.a) * self.scale).view_as(self.layer.weight)

    @property
    def weight(self) -> Tensor:
        """What the layer's weight will be after the merge, before rounding."""
        return self.layer.weight + self.update()

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer itself, now with the updated weight, rounded to its own type once."""
        weight = self.weight.to(self.layer.weight.dtype)
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        return self.layer


class DoRALayer(LoRALayer):
    """A frozen nn.Linear with a trained size and direction: m ⊙ V / ‖V‖, V = W + (α/r) B A.

    m: out, one size per row, ‖W‖ at the start; ‖·‖: each row's length, which the gradient takes for
    a constant, as its authors do (Liu et al. 2024).
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer, rank, alpha)
        self.m = nn.Parameter(layer.weight.to(self.a.dtype).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(x, self.layer.weight) + self.low_rank(x)
        z = (z * self.ratio()).to(x.dtype)
        return z if self.layer.bias is None else z + self.layer.bias

    def ratio(self) -> Tensor:
        """m / ‖V‖, one entry per row."""
        with torch.no_grad():
            length = super().weight.norm(dim=1)
        return self.m / length

    @property
    def weight(self) -> Tensor:
        return self.ratio()[:, None] * super().weight


class PromptedBlock(nn.Module):
    """A frozen ViT block that reads p trained tokens beside the picture's: VPT-deep.

    x: B×N×C, the class token first; the prompts, p×C, stand after it, and in place of those of the
    block before. Their first values are uniform, Xavier's for a patch (Jia et al. 2022). A prompt
    cannot be merged: the adapted model stays slower than its base.
    """

    def __init__(self, block: nn.Module, prompts: int, patch: nn.Conv2d, first: bool):
        super().__init__()
        self.block = block
        self.prompts = nn.Parameter(patch.weight.new_empty(prompts, len(patch.weight)))
        self.first = first
        bound = math.sqrt(6 / (patch.weight[0].numel() + len(patch.weight)))
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, 1 if self.first else 1 + len(self.prompts) :]
        return self.block(torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), patches], 1))


def adapt(model: nn.Module, method: str, args: argparse.Namespace) -> None:
    """Freeze what `method` does not train and add what it does.

    linear: the head, and a LLaMA's last norm (where head and embedding are one matrix, that);
    bias: the biases; full: all; vpt: args.prompts tokens before every block of a ViT;
    san, ssf: γ (and β) of the linked layers and, with args.norms, the norms [C], ssf being feature
    scaling alone with a shift [S]; γ start at 1, SAN's with args.gamma_std around it, as SSF's own
    code has them (0.02) [S]; lora, dora: an update of low rank on the linked layers, of a
    LLaMA on its LOW_RANK layers; san+lora, san+dora [P]: that update inside SAN's two diagonals,
    which act on the updated weight [us]. The rank is args.rank and α equals it [us]. dora and the
    last two are for nn.Linear alone.
    A classifier's new head is trained by every method; a LLaMA's head is pre-trained, as the rest.
    Raises ValueError for vpt on another model than a ViT.
    """
    links = [] if method in UNLINKED else links_of(model, args.wiring)
    is_llama = isinstance(model, models.LLaMA)
    norm_types = (nn.LayerNorm, models.RMSNorm)
    norms = [name for name, m in model.named_modules() if isinstance(m, norm_types) and args.norms]
    head = [] if is_llama else ["head"]
    model.requires_grad_(method == "full")
    for name in ("norm", "head") if is_llama and method == "linear" else head:
        model.get_submodule(name).requires_grad_(True)
    if method.startswith("san"):
        san.attach(model, links, **MODES[args.mode], shift=args.shift, trainable=[*norms, *head])
        for layer in model.modules():
            if isinstance(layer, san.SANLayer) and layer.gamma is not None:
                nn.init.normal_(layer.gamma, 1.0, args.gamma_std)
    elif method == "ssf":
        san.attach(model, links, propagate=False, shift=True, trainable=[*norms, *head])
    elif method == "bias":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias") or parameter.requires_grad)
    elif method == "vpt":
        if not isinstance(model, models.ViT):
            raise ValueError(f"vpt prompts a ViT's tokens, and this is a {type(model).__name__}")
        for i, block in enumerate(model.blocks):
            model.blocks[i] = PromptedBlock(block, args.prompts, model.patch_embed, i == 0)
    kind = method.removeprefix("san+")
    if kind in ("lora", "dora"):
        layer_type = LoRALayer if kind == "lora" else DoRALayer
        for name in (link.layer for link in links):
            if not is_llama or name.endswith(LOW_RANK):
                inner = f"{name}.layer" if kind != method else name  # inside the SAN layer
                layer = layer_type(model.get_submodule(inner), args.rank, alpha=args.rank)
                model.set_submodule(inner, layer)


def links_of(model: nn.Module, wiring: str) -> list[san.Link]:
    """The model's links; the authors' wiring is a ViT's alone. Raises ValueError."""
    if isinstance(model, models.ViT):
        return model.links(wiring)
    if wiring == "authors":
        raise ValueError("the authors' wiring is defined for ViT alone; leave --wiring out")
    return model.links()


def fold(model: nn.Module) -> None:
    """Make plain layers of whatever `adapt` added, but for vpt's prompts, which stay."""
    for name, module in list(model.named_modules()):  # updates first: they are inside SAN layers
        if isinstance(module, LoRALayer):
            model.set_submodule(name, module.merged())
    if hasattr(model, "_san"):
        san.merge(model)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Name → values of what requires a gradient: all that a checkpoint must hold of the model."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
