"""Models small enough for a test, torchvision's and ours, and the files that others publish."""

from functools import cache

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from models import ConvNeXt, Swin, ViT

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
