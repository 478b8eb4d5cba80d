"""SAN and what it is compared with: what each trains, and how it becomes plain layers again.

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
UNLINKED = ("linear", "norm", "bias", "vpt", "full")  # methods that know nothing of links
# the settings that not every method reads, and which methods do
SANS, UPDATES = ("san", "san2", "san+lora", "san+dora"), ("lora", "dora", "san+lora", "san+dora")
READERS = {
    "mode": SANS,
    "wiring": SANS,
    "shift": (*SANS, "hyperadapt"),
    "gamma_std": (*SANS, "hyperadapt"),
    "norms": (*SANS, "hyperadapt", "ssf"),
    "prompts": ("vpt",),
    "rank": UPDATES,
    "alpha": UPDATES,
}
SECOND = ("fc2", "pwconv2", "down_proj")  # an MLP's last layer, which IA³ scales at its input


def wide(layer: nn.Module) -> torch.dtype:
    """The layer's type, but float32 at least: half precision would round a step to nothing."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


class LoRALayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d plus a trained update of low rank: W + (α/r) B A.

    B: out×r, zeros at the start; A: r×(all inputs of one output), Kaiming-uniform (Hu et al. 2022).
    A convolution's kernel counts as a matrix, out × in/groups·kh·kw. x and output: as the layer's.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        weight, dtype = layer.weight, wide(layer)
        self.layer = layer
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight[0].numel(), dtype=dtype))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank, dtype=dtype))
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
        old, weight = self.layer.weight, self.weight.to(self.layer.weight.dtype)
        if hasattr(old, "full_tensor"):  # FSDP2 holds on to the parameter, so it stays
            old.copy_(weight)
        else:
            self.layer.weight = nn.Parameter(weight, requires_grad=False)
        return self.layer


class DoRALayer(LoRALayer):
    """LoRA with the size of each row trained apart: m ⊙ V / ‖V‖, V = W + (α/r) B A.

    m: out, ‖W‖ at the start; ‖·‖: per output channel, over all that it reads. The gradient takes
    ‖V‖ for a constant, as the authors do (Liu et al. 2024).
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__(layer, rank, alpha)
        self.m = nn.Parameter(layer.weight.to(self.a.dtype).flatten(1).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, nn.Linear):
            return super().forward(x)
        z = nn.functional.linear(x, self.layer.weight) + self.low_rank(x)
        z = (z * self.ratio()).to(x.dtype)
        return z if self.layer.bias is None else z + self.layer.bias

    def ratio(self) -> Tensor:
        """m / ‖V‖, one entry per output channel."""
        with torch.no_grad():
            length = super().weight.flatten(1).norm(dim=1)
        return self.m / length

    @property
    def weight(self) -> Tensor:
        updated = super().weight
        return self.ratio().view(-1, *[1] * (updated.ndim - 1)) * updated


class ColumnLayer(nn.Module):
    """A frozen nn.Linear or nn.Conv2d with a trained scale per input channel: W diag(a).

    a: in, ones at the start. Computed as W (a ⊙ x): as with SAN's γ', no gradient is as large as W.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.groups = layer, getattr(layer, "groups", 1)
        inputs = self.groups * layer.weight.shape[1]
        self.a = nn.Parameter(layer.weight.new_ones(inputs, dtype=wide(layer)))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a.view(-1, *[1] * (self.layer.weight.ndim - 2))  # beside the channels of x
        return self.layer((a * x).to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """W diag(a), before rounding; the rows of group i have the i-th stretch of a."""
        rows = self.layer.weight.unflatten(0, (self.groups, -1))  # g out/g in/g h w
        a = self.a.view(self.groups, 1, -1, *[1] * (rows.ndim - 3))
        return (rows * a).flatten(0, 1)

    bias, merged = LoRALayer.bias, LoRALayer.merged


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

    A classifier's new head is trained by every method; a LLaMA's head is pre-trained, as the rest.
    A LLaVA is a LLaMA whose projector is trained by every method and whose tower is frozen, as in
    the reference code; with args.tower the tower is adapted as the rest is, on all linked layers.
    With args.blind it reads no pictures, and neither of the two is trained.

    The base's own parameters:
    linear      the head, and a LLaMA's last norm (where head and embedding are one matrix, that)
    norm        the norms (Zhao et al. 2024)
    bias        the biases (Zaken et al. 2022)
    full        all
    projector   a LLaVA's projector alone, its first stage of pre-training
    Beside a frozen base:
    vpt         args.prompts tokens before every block of a ViT (Jia et al. 2022)
    lora, dora  LoRALayer, DoRALayer on the linked layers, of a LLaMA on its LOW_RANK layers; the
                rank is args.rank, and α args.alpha or, where that is None, the rank [us]
    ia3         scales of the outputs, bias included, of every linked nn.Linear, but of the inputs
                of an MLP's SECOND layer (Liu et al. 2022, as PEFT has it)
    ssf         γ and β on the linked layers, without propagation [S]
    san         γ with feature scaling and propagation, or as args.mode says; with args.shift β
    san2        SAN with W diag(γ' ⊙ a) where it has W diag(γ'); a is trained [C, early commits]
    hyperadapt  SAN without sharing: W diag(a), a trained, on every linked layer, also where SAN
                propagates nothing. HyperAdapt (arXiv 2509.18629) scales matrices alone, and no
                bias; all but a is as with san here, so that the difference is the sharing of γ [us]
    san+lora, san+dora  that update inside SAN's two diagonals [P], which act on the updated weight
                [us]

    ssf, hyperadapt and SAN's kinds train the norms too, with args.norms [C]. Scales start at 1; the
    γ of hyperadapt and SAN's kinds at N(1, args.gamma_std). SSF's own code has 0.02 there [S].
    Raises ValueError for vpt on another model than a ViT.
    """
    is_llama, sees = isinstance(model, models.LLaMA), isinstance(model, models.LLaVA)
    if sees:
        links = model.links(tower=args.tower, projector=False)
    else:
        links = [] if method in UNLINKED else links_of(model, args.wiring)
    like_san = method in READERS["norms"]
    frozen = ("tower.",) if sees and not args.tower else ()
    frozen += ("projector.",) if sees and args.blind else ()
    trained = [] if is_llama else ["head"]
    trained += ["projector"] if sees and not args.blind else []
    if method == "linear" and is_llama:
        trained += ["norm", "head"]
    elif method == "norm" or (like_san and args.norms):
        norm_types = (nn.LayerNorm, models.RMSNorm)
        norms = [name for name, m in model.named_modules() if isinstance(m, norm_types)]
        trained += [name for name in norms if not name.startswith(frozen)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" and not name.startswith(frozen))
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    if like_san:
        add_scales(model, method, links, trained, args)
    elif method == "ia3":
        add_ia3(model, links, trained)
    elif method == "bias":
        for name, parameter in model.named_parameters():
            own = name.endswith(".bias") and not name.startswith(frozen)
            parameter.requires_grad_(own or parameter.requires_grad)
    elif method == "vpt":
        if not isinstance(model, models.ViT):
            raise ValueError(f"vpt prompts a ViT's tokens, and this is a {type(model).__name__}")
        for i, block in enumerate(model.blocks):
            model.blocks[i] = PromptedBlock(block, args.prompts, model.patch_embed, i == 0)
    if method in UPDATES:
        layer_type = DoRALayer if method.endswith("dora") else LoRALayer
        for name in (link.layer for link in links):
            if not is_llama or name.endswith(LOW_RANK) or name.startswith("tower."):
                wrap(model, name, layer_type, args.rank, args.alpha or args.rank)


def add_scales(
    model: nn.Module,
    method: str,
    links: list[san.Link],
    trained: list[str],
    args: argparse.Namespace,
) -> None:
    """What ssf, hyperadapt and SAN's kinds scale and shift; `trained` is trained besides."""
    mode = MODES[args.mode if method in SANS else "feature"]
    shift = args.shift or method == "ssf"
    san.attach(model, links, **mode, shift=shift, trainable=trained)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, san.SANLayer)]
    for name, layer in layers:
        if method != "ssf" and layer.gamma is not None:
            nn.init.normal_(layer.gamma, 1.0, args.gamma_std)
        if method == "hyperadapt" or (method == "san2" and layer.anterior):
            wrap(model, name, ColumnLayer)


def add_ia3(model: nn.Module, links: list[san.Link], trained: list[str]) -> None:
    """IA³'s scales, those of outputs as a γ not propagated; `trained` is trained besides."""
    linear = [n for n, *_ in links if isinstance(model.get_submodule(n), nn.Linear)]
    second = [name for name in linear if name.endswith(SECOND)]
    outputs = [san.Link(name) for name in linear if name not in second]
    san.attach(model, outputs, propagate=False, trainable=trained)
    for name in second:
        wrap(model, name, ColumnLayer)


def wrap(model: nn.Module, name: str, layer_type: type[nn.Module], *options: float) -> None:
    """Put layer_type(layer, *options) in the frozen layer's place, inside of a SAN layer if any."""
    if isinstance(model.get_submodule(name), san.SANLayer):
        name = f"{name}.layer"
    model.set_submodule(name, layer_type(model.get_submodule(name), *options))


def links_of(model: nn.Module, wiring: str) -> list[san.Link]:
    """The model's links; the authors' wiring is a ViT's alone. Raises ValueError."""
    if isinstance(model, models.ViT):
        return model.links(wiring)
    if wiring == "authors":
        raise ValueError("the authors' wiring is defined for ViT alone; leave --wiring out")
    return model.links()


def fold(model: nn.Module) -> None:
    """Make plain layers of whatever `adapt` added, but for vpt's prompts, which stay."""
    for name, module in list(model.named_modules()):  # what is inside SAN layers first
        if isinstance(module, (LoRALayer, ColumnLayer)):
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
