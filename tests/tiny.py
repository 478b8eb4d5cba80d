"""Models small enough for a test, torchvision's and ours, and the files that others publish.

Also what the tests of both kinds of model ask of a model's links.
"""

import copy
from functools import cache

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from models import ConvNeXt, LayerNorm2d, RMSNorm, Swin, ViT
from san import Link

TINY_VIT = dict(image_size=32, patch=8, dim=8, depth=2, heads=2)
TINY_CONVNEXT = dict(image_size=32, depths=(1, 2), dims=(4, 8), drop_path=0.0)
# grids of 8×8 and 4×4, padded to 9×9 and 6×6
TINY_SWIN = dict(image_size=32, patch=4, window=3, dim=8, depths=(2, 2), heads=(2, 4))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter gets a value that matters: fresh models have zero heads and tiny scales."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "layer_scale" not in name and "position" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            shift = 1 if "norm" in name or "ln" in name or "layer_scale" in name else 0
            parameter.normal_(mean=shift, std=0.3)
    return model.eval()


def tiny_vit(outputs: int = 5, **changes) -> ViT:
    return randomise(ViT(outputs, **{**TINY_VIT, **changes}))


def tiny_convnext(outputs: int = 5, **changes) -> ConvNeXt:
    return randomise(ConvNeXt(outputs, **{**TINY_CONVNEXT, **changes}))


def tiny_swin(outputs: int = 5, **changes) -> Swin:
    return randomise(Swin(outputs, **{**TINY_SWIN, "drop_path": 0.0, **changes}))


def random_images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    return (one(images) - other(images)).abs().max().item()


# ----------------------------------------------------------------------------------------- links


def propagated_nowhere(model: nn.Module, links: list[Link]) -> dict[str, list[int]]:
    """Layer → those of its output channels whose γ no posterior reads, where there are any."""
    unread = {link.layer: {*range(len(model.get_submodule(link.layer).weight))} for link in links}
    for _, anterior, index in links:
        if anterior is not None:
            unread[anterior] -= unread[anterior] if index is None else {*index}
    return {layer: sorted(channels) for layer, channels in unread.items() if channels}


def along_channels(vectors: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    """B×C → the shape that scales the channels of x, B×…, which `module` reads or gives."""
    vectors = vectors.view(len(x), *[1] * (x.ndim - 2), -1)
    return vectors.movedim(-1, 1) if isinstance(module, (nn.Conv2d, LayerNorm2d)) else vectors


def derivatives(
    model: nn.Module, links: list[Link], inputs: Tensor, shift: bool, norms: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs' derivatives by a scale of each linked layer's input, KB×C by layer, and by all
    that feature scaling trains, side by side: KB×(as much).

    That is a γ and, with `shift`, a β per linked layer, with `norms` the norms, and a classifier's
    head. Taken at γ = 1, which is no special place where weights are random. model: in float64.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    span = []
    if (outputs := model(inputs)).ndim == 2:  # a classifier: its head's weight and bias
        head = torch.cat([model.features(inputs), torch.ones(len(inputs), 1)], dim=1)
        span.append(torch.block_diag(*[head] * outputs.shape[1]))
    columns, gammas, betas = {}, {}, {}  # module → B×C: a vector per sample, one pass for all

    def before(module: nn.Module, args: tuple) -> Tensor:
        return args[0] * along_channels(columns[module], args[0], module)

    def after(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
        z = z * along_channels(gammas[module], z, module)
        return z + along_channels(betas[module], z, module) if module in betas else z

    def vectors(value: float, channels: int) -> Tensor:
        return torch.full((len(inputs), channels), value).double().requires_grad_()

    layers = {model.get_submodule(link.layer): link.layer for link in links}
    for module in model.modules():
        is_norm = isinstance(module, (nn.LayerNorm, RMSNorm)) and norms
        if module in layers:
            columns[module] = vectors(1, module.weight.shape[1] * getattr(module, "groups", 1))
            module.register_forward_pre_hook(before)
        if module in layers or is_norm:  # a norm's weight and bias act as a γ and a β
            gammas[module] = vectors(1, len(module.weight))
            module.register_forward_hook(after)
            if getattr(module, "bias", None) is not None and (shift or is_norm):
                betas[module] = vectors(0, len(module.weight))
    outputs = model(inputs)
    outputs = outputs if span else outputs[:, -1]  # B×K: the last token's logits will do
    leaves = [*columns.values(), *gammas.values(), *betas.values()]
    parts = [torch.autograd.grad(y.sum(), leaves, retain_graph=True) for y in outputs.unbind(1)]
    found = [torch.cat(part) for part in zip(*parts)]
    by_column = dict(zip((layers[module] for module in columns), found))
    return by_column, torch.cat(span + found[len(columns) :], dim=1)


def reaching_new_functions(
    model: nn.Module, links: list[Link], inputs: Tensor, shift: bool, norms: bool
) -> set[str]:
    """The layers where the anterior's γ, propagated, does what feature scaling cannot.

    To first order: its derivative lies outside the span of feature scaling's.
    """
    by_column, span = derivatives(model, links, inputs, shift, norms)
    basis, values, _ = torch.linalg.svd(span, full_matrices=False)
    basis = basis[:, values > 1e-10 * values[0]]
    assert len(basis) > 1.2 * basis.shape[1]  # with few outputs everything lies in the span
    found = set()
    for anterior in {link.anterior for link in links} - {None}:
        readers = [link for link in links if link.anterior == anterior]
        channels = len(model.get_submodule(anterior).weight)
        propagated = torch.zeros(len(span), channels).double()
        for link in readers:
            index = range(channels) if link.index is None else link.index
            propagated.index_add_(1, torch.tensor([*index]), by_column[link.layer])
        outside = propagated - basis @ (basis.T @ propagated)
        share = (outside.norm() / propagated.norm()).item()
        assert share < 1e-11 or share > 1e-5, (anterior, share)  # nothing in doubt
        if share > 1e-5:
            found |= {link.layer for link in readers}
    return found


# ----------------------------------------------------------------------------------- torchvision


@cache
def torchvisions_tiny_vit() -> nn.Module:
    return randomise(
        torchvision.models.VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=32,
            num_classes=5,
        ),
        seed=1,
    )


@cache
def torchvisions_tiny_convnext() -> nn.Module:
    return randomise(
        torchvision.models.ConvNeXt(
            [CNBlockConfig(4, 8, 1), CNBlockConfig(8, None, 2)], num_classes=5
        ),
        seed=1,
    )


@cache
def torchvisions_tiny_swin() -> nn.Module:
    return randomise(
        torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[3, 3],
            num_classes=5,
        ),
        seed=1,
    )


# ------------------------------------------------------------------------- as the authors publish


@torch.no_grad()
def published_vit(model: ViT) -> dict[str, np.ndarray]:
    """The .npz arrays of a ViT that reads (x − 0.5) / 0.5 as `model` reads (x − mean) / std."""
    arrays = {"cls": model.class_token}
    arrays["Transformer/posembed_input/pos_embedding"] = model.position

    def put(name: str, layer: nn.Module, kind: str = "kernel") -> None:
        arrays[f"{name}/{kind}"], arrays[f"{name}/bias"] = layer.weight.t(), layer.bias

    for i, block in enumerate(model.blocks):
        root = f"Transformer/encoderblock_{i}"
        put(f"{root}/LayerNorm_0", block.norm1, "scale")
        put(f"{root}/LayerNorm_2", block.norm2, "scale")
        put(f"{root}/MlpBlock_3/Dense_0", block.mlp.fc1)
        put(f"{root}/MlpBlock_3/Dense_1", block.mlp.fc2)
        attention, heads = f"{root}/MultiHeadDotProductAttention_1", block.attn.heads
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases):
            arrays[f"{attention}/{name}/kernel"] = weight.T.unflatten(1, (heads, -1))  # C h d
            arrays[f"{attention}/{name}/bias"] = bias.unflatten(0, (heads, -1))  # h d
        arrays[f"{attention}/out/kernel"] = block.attn.proj.weight.T.unflatten(0, (heads, -1))
        arrays[f"{attention}/out/bias"] = block.attn.proj.bias
    put("Transformer/encoder_norm", model.norm, "scale")
    put("head", model.head)
    dim = model.head.in_features
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = torch.ones(dim, dim), torch.ones(dim)

    # what gives W x + b again for x = (p − mean) / std, from pixels read as (p − 0.5) / 0.5
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    weight = model.patch_embed.weight
    arrays["embedding/kernel"] = torch.einsum("oihw,i->hwio", weight, 0.5 / std)
    arrays["embedding/bias"] = model.patch_embed.bias + torch.einsum(
        "oihw,i->o", weight, (0.5 - mean) / std
    )
    return {key: value.numpy().copy() for key, value in arrays.items()}


def entries(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{kind}": value for kind, value in layer.state_dict().items()}


def published_convnext(model: ConvNeXt) -> dict:
    state = {}
    for i, halving in enumerate([model.stem, *model.downsample]):
        state |= entries(f"downsample_layers.{i}.0", halving[0])
        state |= entries(f"downsample_layers.{i}.1", halving[1])
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            state[f"stages.{i}.{j}.gamma"] = block.layer_scale.detach()
            for name in ("dwconv", "norm", "pwconv1", "pwconv2"):
                state |= entries(f"stages.{i}.{j}.{name}", block.get_submodule(name))
    state |= entries("norm", model.norm)
    state |= entries("head", model.head)
    return {"model": state}


def published_swin(model: Swin) -> dict:
    state = entries("patch_embed.proj", model.patch_embed)
    state |= entries("patch_embed.norm", model.patch_norm)
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            root = f"layers.{i}.blocks.{j}"
            if block.attn.shift:
                places = block.attn.window**2
                state[f"{root}.attn_mask"] = torch.zeros(4, places, places)
            for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                state |= entries(f"{root}.{name}", block.get_submodule(name))
            table = block.attn.offset_bias.detach()
            state[f"{root}.attn.relative_position_bias_table"] = table
            state[f"{root}.attn.relative_position_index"] = block.attn.index
    for i, merging in enumerate(model.downsample):
        state |= entries(f"layers.{i}.downsample.reduction", merging.reduction)
        state |= entries(f"layers.{i}.downsample.norm", merging.norm)
    state |= entries("norm", model.norm)
    state |= entries("head", model.head)
    return {"model": state}
