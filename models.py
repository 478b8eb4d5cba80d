"""Two backbones written by hand: ViT and ConvNeXt, each with its links for `san.attach`.

A model here is its forward pass: `features(images)` gives one vector a picture, `head` reads it.
`links()` says which layer is anterior to which; the table and its reasons are in each docstring.
Layer names and numbers match torchvision's models, whose weights `from_torchvision` converts.

B pictures, N tokens, C channels, h heads, H×W pixels; pixels come in normalised, B×3×H×W.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from san import Link

# ------------------------------------------------------------------------------------------ ViT


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √d) v, with q, k and v from one fused layer."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # B N 3 h d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B h N d
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # B N C


class MLP(nn.Module):
    """Two layers with a GELU between: C → 4C → C."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): class token, learned positions, pre-norm."""

    def __init__(
        self, outputs: int, image_size: int, patch: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch}")
        self.image_size = image_size
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        initialise(self)

    def features(self, images: Tensor) -> Tensor:
        """Normalised pictures, B×3×H×W → the class token after the last norm, B×C."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # B N C
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self, wiring: str = "exact") -> list[Link]:
        """The links of every layer but the head.

        layer      exact (our reading of the paper)        authors (their v1 code)
        qkv        the last layer that wrote to the        patch_embed, in every block
                   stream: patch_embed, then fc2
        attn.proj  the value third of qkv: attention       none
                   mixes tokens, not channels, so
                   A (γ ⊙ v) = γ ⊙ (A v) is exact
        fc1        attn.proj, through residual and norm    attn.proj
        fc2        fc1, through GELU                       fc1
        """
        if wiring not in ("exact", "authors"):
            raise ValueError(f"wiring '{wiring}' is unknown; choose 'exact' or 'authors'")
        exact = wiring == "exact"
        dim = self.head.in_features
        value_third = range(2 * dim, 3 * dim)
        links, stream = [Link("patch_embed")], "patch_embed"
        for i in range(len(self.blocks)):
            attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            links.append(Link(f"{attn}.qkv", stream))
            links.append(
                Link(f"{attn}.proj", f"{attn}.qkv", value_third) if exact else Link(f"{attn}.proj")
            )
            links.append(Link(f"{mlp}.fc1", f"{attn}.proj"))
            links.append(Link(f"{mlp}.fc2", f"{mlp}.fc1"))
            if exact:
                stream = f"{mlp}.fc2"
        return links


# ------------------------------------------------------------------------------------- ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of B×C×H×W."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + layer_scale ⊙ pwconv2(GELU(pwconv1(norm(dwconv(x))))), dropped whole at random.

    The pointwise convolutions are linear layers on channels-last pictures. `layer_scale` is
    ConvNeXt's own; its paper calls it gamma, a name that belongs to SAN's feature scale here.
    """

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.layer_scale = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        z = self.dwconv(x).permute(0, 2, 3, 1)  # B H W C
        z = self.pwconv2(F.gelu(self.pwconv1(self.norm(z))))
        z = (self.layer_scale * z).permute(0, 3, 1, 2)  # B C H W
        if self.training and self.drop_path > 0:  # stochastic depth, one draw a picture
            keep = 1 - self.drop_path
            z = z * (torch.rand(len(z), 1, 1, 1, device=z.device) < keep).to(z.dtype) / keep
        return x + z


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022): a stem and stages of blocks, a halving convolution between."""

    def __init__(
        self, outputs: int, image_size: int, depths: tuple, dims: tuple, drop_path: float
    ) -> None:
        super().__init__()
        smallest = 4 * 2 ** (len(dims) - 1)  # what leaves one place after every halving
        if image_size < smallest:
            raise ValueError(f"image size {image_size} is too small; take {smallest} or more")
        self.image_size = image_size
        # deeper blocks drop more often; on the CPU whatever torch's default device is
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=1e-6)
        )
        self.downsample = nn.ModuleList(
            nn.Sequential(LayerNorm2d(a, eps=1e-6), nn.Conv2d(a, b, kernel_size=2, stride=2))
            for a, b in zip(dims, dims[1:])
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, rates.pop(0)) for _ in range(depth)))
            for dim, depth in zip(dims, depths)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], outputs)
        initialise(self)

    def features(self, images: Tensor) -> Tensor:
        """Normalised pictures, B×3×H×W → the average over places after the last norm, B×C."""
        # channels-last, since the norms and pointwise layers want it: about 1.5 times as fast
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample[i - 1](x) if i else x)
        return self.norm(x.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self, wiring: str = "exact") -> list[Link]:
        """The links of every layer but the head: each layer's anterior is the layer before it.

        layer            anterior
        dwconv           the last layer that wrote to the stream: stem, downsample or pwconv2
                         (output channel c reads input channel c alone)
        pwconv1          dwconv, through the norm
        pwconv2          pwconv1, through GELU
        downsample conv  the stage's last pwconv2

        Raises ValueError for a wiring other than "exact": the authors' v1 code wires ViTs.
        """
        if wiring != "exact":
            raise ValueError(f"wiring '{wiring}' is defined for ViT alone; choose 'exact'")
        links, stream = [Link("stem.0")], "stem.0"
        for i, stage in enumerate(self.stages):
            if i:
                links.append(Link(f"downsample.{i - 1}.1", stream))
                stream = f"downsample.{i - 1}.1"
            for j in range(len(stage)):
                block = f"stages.{i}.{j}"
                links.append(Link(f"{block}.dwconv", stream))
                links.append(Link(f"{block}.pwconv1", f"{block}.dwconv"))
                links.append(Link(f"{block}.pwconv2", f"{block}.pwconv1"))
                stream = f"{block}.pwconv2"
        return links


# ------------------------------------------------------------------------------ sizes, building


def initialise(model: nn.Module) -> None:
    """Weights from a normal of std 0.02 cut at two standard deviations, biases zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


# name: class, picture size it is made for, and the numbers that make its size
SIZES = {
    "vit_micro": (ViT, 32, dict(patch=4, dim=96, depth=4, heads=3)),
    "vit_tiny": (ViT, 224, dict(patch=16, dim=192, depth=12, heads=3)),
    "vit_s16": (ViT, 224, dict(patch=16, dim=384, depth=12, heads=6)),
    "vit_b16": (ViT, 224, dict(patch=16, dim=768, depth=12, heads=12)),
    "vit_l16": (ViT, 224, dict(patch=16, dim=1024, depth=24, heads=16)),
    "convnext_micro": (ConvNeXt, 32, dict(depths=(2, 2, 2), dims=(40, 80, 160), drop_path=0.0)),
    "convnext_tiny": (
        ConvNeXt,
        224,
        dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), drop_path=0.1),
    ),
    "convnext_base": (
        ConvNeXt,
        224,
        dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024), drop_path=0.5),
    ),
}


def build(name: str, outputs: int, image_size: int | None = None) -> nn.Module:
    """The model `name` of SIZES with random weights, `outputs` logits, for pictures of that size.

    Raises ValueError if the name is unknown or the image size does not fit the model.
    """
    if name not in SIZES:
        raise ValueError(f"model '{name}' is unknown; choose one of {', '.join(SIZES)}")
    model_class, default_size, numbers = SIZES[name]
    return model_class(outputs, image_size or default_size, **numbers)


# --------------------------------------------------------------------------------------- weights

# torchvision's names → ours, tried in this order on the start of every key; ConvNeXt's numbers
# stay torchvision's here, and are halved in a second step
VIT_NAMES = [
    (r"encoder\.pos_embedding", "position"),
    (r"conv_proj", "patch_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])", r"blocks.\1.norm\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj", r"blocks.\1.attn.proj"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(0|linear_1)", r"blocks.\1.mlp.fc1"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(3|linear_2)", r"blocks.\1.mlp.fc2"),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
]
CONVNEXT_NAMES = [
    (r"features\.0\.", "stem."),
    (r"features\.([1357])\.(\d+)\.block\.0", r"stages.\1.\2.dwconv"),
    (r"features\.([1357])\.(\d+)\.block\.2", r"stages.\1.\2.norm"),
    (r"features\.([1357])\.(\d+)\.block\.3", r"stages.\1.\2.pwconv1"),
    (r"features\.([1357])\.(\d+)\.block\.5", r"stages.\1.\2.pwconv2"),
    (r"features\.([1357])\.(\d+)\.layer_scale", r"stages.\1.\2.layer_scale"),
    (r"features\.([246])\.", r"downsample.\1."),
    (r"classifier\.0", "norm"),
    (r"classifier\.2", "head"),
]


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of torchvision's VisionTransformer or ConvNeXt under our names and shapes.

    torchvision numbers ConvNeXt's stages and the halvings between them in one row: 1, 3, 5, 7
    are stages 0 to 3, and 2, 4, 6 are halvings 0 to 2.
    """
    is_vit = "conv_proj.weight" in state
    converted = {}
    for key, value in state.items():
        for pattern, ours in VIT_NAMES if is_vit else CONVNEXT_NAMES:
            new, found = re.subn("^" + pattern, ours, key)
            if found:
                key = new
                break
        if not is_vit:
            key = re.sub(r"^stages\.(\d)", lambda m: f"stages.{int(m[1]) // 2}", key)
            key = re.sub(r"^downsample\.(\d)", lambda m: f"downsample.{int(m[1]) // 2 - 1}", key)
        converted[key] = value.flatten() if key.endswith("layer_scale") else value
    return converted


def resize_position(position: Tensor, tokens: int) -> Tensor:
    """Position embeddings, 1×(1+n²)×C → 1×tokens×C: the grid interpolated, the class token kept."""
    old, new = (round((count - 1) ** 0.5) for count in (position.shape[1], tokens))
    grid = position[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()  # 1 C n n
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    grid = grid.flatten(2).transpose(1, 2).to(position.dtype)
    return torch.cat([position[:, :1], grid], dim=1)


def load_backbone(model: nn.Module, state: dict[str, Tensor], head: bool = False) -> None:
    """Copy a state dict in our names into `model`; its head only if asked, else it stays as it was.

    Positions of another image size are interpolated. Raises ValueError, and changes nothing,
    if other keys or shapes differ, naming the first of them.
    """
    own = model.state_dict()
    state = dict(state)
    if "position" in state and "position" in own and state["position"].ndim == 3:
        position, tokens = state["position"], own["position"].shape[1]
        square = math.isqrt(position.shape[1] - 1) ** 2 == position.shape[1] - 1
        if square and position.shape[1] != tokens:
            state["position"] = resize_position(position, tokens)
    if not head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in own.items() if key.startswith("head.")}
    wrong = [
        f"{key} ({describe(state.get(key))} in the file, {describe(own.get(key))} in the model)"
        for key in [*own, *(key for key in state if key not in own)]
        if key not in state or key not in own or state[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"these weights are of another architecture: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
    model.load_state_dict(state)


def describe(tensor: Tensor | None) -> str:
    """A tensor's shape in words, for messages: 96×96, or 'missing'."""
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"
