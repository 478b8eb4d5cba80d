"""Four backbones written by hand, ViT, ConvNeXt, Swin and LLaMA, with their links for `san.attach`.

A model here is its forward pass: `features` gives one vector a picture, or one a token of a text,
and `head` reads it. `links()` says which layer is anterior to which; the table and its reasons are
in each docstring.

B pictures or texts, N tokens, C channels, h heads of d channels, V words, H×W pixels; pixels come
in normalised, B×3×H×W.
"""

import math
from collections.abc import Sequence

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

    def links(self, wiring: str = "san") -> list[Link]:
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
        if wiring not in ("san", "authors"):
            raise ValueError(f"wiring '{wiring}' is unknown; choose 'san' or 'authors'")
        exact = wiring == "san"
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


def stochastic_depth(z: Tensor, rate: float) -> Tensor:
    """A branch's output, B×…×…×…, zero with probability `rate`, else z / (1 − rate), by picture."""
    if rate == 0:
        return z
    keep = 1 - rate
    return z * (torch.rand(len(z), 1, 1, 1, device=z.device) < keep).to(z.dtype) / keep


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
        return x + stochastic_depth(z, self.drop_path if self.training else 0.0)


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

    def links(self, wiring: str = "san") -> list[Link]:
        """The links of every layer but the head: each layer's anterior is the layer before it.

        layer            anterior
        dwconv           the last layer that wrote to the stream: stem, downsample or pwconv2
                         (output channel c reads input channel c alone)
        pwconv1          dwconv, through the norm
        pwconv2          pwconv1, through GELU
        downsample conv  the stage's last pwconv2

        Raises ValueError for a wiring other than "san": the authors' v1 code wires ViTs.
        """
        if wiring != "san":
            raise ValueError(f"wiring '{wiring}' is defined for ViT alone; choose 'san'")
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


# ----------------------------------------------------------------------------------------- Swin


def to_windows(x: Tensor, window: int) -> Tensor:
    """B×H×W×C → the n = HW / w² windows of w×w places, row by row, B×n×w²×C."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # B H/w w W/w w C
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: int, height: int) -> Tensor:
    """The inverse of `to_windows`: B×n×w²×C → B×H×W×C."""
    x = x.unflatten(2, (window, window)).unflatten(1, (height // window, -1))  # B H/w W/w w w C
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(Attention):
    """Attention inside windows of w×w places, softmax(q kᵀ / √d + bias) v, on B×H×W×C.

    The bias is learned, one number for each head and each of the (2w − 1)² offsets from one place
    of a window to another. With a shift s the grid is first rolled up and left by s, cyclically,
    so that windows straddle the borders of the unshifted ones; attention is then masked between
    places that the roll alone made neighbours. The grid is padded with zeros to whole windows.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int):
        super().__init__(dim, heads)
        self.window, self.shift = window, shift
        self.offset_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.offset_bias, std=0.02)
        # place (y, x) becomes y (2w − 1) + x, so that a difference of two tells the offset
        place = torch.arange(window**2)
        place = place // window * (2 * window - 1) + place % window
        index = place[:, None] - place + 2 * window * (window - 1)  # w²×w², from 0 on
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w, (height, width) = self.window, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        sides = x.shape[1:3]
        shifts = [self.shift if side > w else 0 for side in sides]  # one window holds it all
        x = to_windows(x.roll([-s for s in shifts], dims=(1, 2)), w)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # B n w² 3 h d
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each B n h w² d
        bias = self.offset_bias[self.index].permute(2, 0, 1)  # h w² w²
        if any(shifts):
            bias = bias.masked_fill(self.apart(sides, shifts)[:, None], -math.inf)  # n h w² w²
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = self.proj(x.transpose(2, 3).flatten(3))  # B n w² C
        return from_windows(x, w, sides[0]).roll(shifts, dims=(1, 2))[:, :height, :width]

    def apart(self, sides: Sequence[int], shifts: Sequence[int]) -> Tensor:
        """n×w²×w², True for two places of a shifted window that are no neighbours in the picture.

        They are those on either side of the seam, s places before the rolled grid's end.
        """
        below, right = (
            torch.arange(side, device=self.index.device) >= side - shift
            for side, shift in zip(sides, shifts)
        )
        region = 2 * below[:, None] + right.long()  # H×W, 0 … 3
        region = to_windows(region[None, :, :, None], self.window)[0]  # n×w²×1
        return region != region.transpose(1, 2)


class SwinBlock(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), each branch dropped whole at random."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = WindowAttention(dim, heads, window, shift)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_path if self.training else 0.0
        x = x + stochastic_depth(self.attn(self.norm1(x)), rate)
        return x + stochastic_depth(self.mlp(self.norm2(x)), rate)


class PatchMerging(nn.Module):
    """Each 2×2 neighbours side by side, 4C channels, then reduction(norm(x)): 4C → 2C."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B H/2 2 W/2 2 C
        # the lower neighbour comes before the right one, as the published weights have it
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Swin(nn.Module):
    """Swin Transformer (Liu et al. 2021): attention in windows, shifted in every second block.

    Stages of blocks with a patch merging between, which halves the grid and doubles the channels.
    dim: channels of the first stage; depths, heads: a number for each stage.
    """

    def __init__(
        self,
        outputs: int,
        image_size: int,
        patch: int,
        window: int,
        dim: int,
        depths: tuple,
        heads: tuple,
        drop_path: float,
    ) -> None:
        super().__init__()
        if image_size < patch:
            raise ValueError(f"image size {image_size} is too small; take {patch} or more")
        self.image_size = image_size
        # deeper blocks drop more often; on the CPU, as in ConvNeXt
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        dims = [dim * 2**i for i in range(len(depths))]
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.patch_norm = nn.LayerNorm(dim, eps=1e-5)
        self.downsample = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(SwinBlock(dim, h, window, j % 2 * (window // 2), rates.pop(0)) for j in range(n))
            )
            for dim, n, h in zip(dims, depths, heads)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5)
        self.head = nn.Linear(dims[-1], outputs)
        initialise(self)

    def features(self, images: Tensor) -> Tensor:
        """Normalised pictures, B×3×H×W → the average over places of the last norm, B×C."""
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))  # B H/p W/p C
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample[i - 1](x) if i else x)
        return self.norm(x).mean((1, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self, wiring: str = "san") -> list[Link]:
        """The links of every layer but the head.

        layer      anterior
        qkv        the last layer that wrote to the stream: patch_embed, reduction or fc2
        attn.proj  the value third of qkv, exact as in ViT: windows, shifts and biases choose
                   which tokens mix, and channels still do not
        fc1        attn.proj, through residual and norm
        fc2        fc1, through GELU
        reduction  the stage's last fc2, its channels repeated for each of the 4 neighbours

        Raises ValueError for a wiring other than "san": the authors' v1 code wires ViTs.
        """
        if wiring != "san":
            raise ValueError(f"wiring '{wiring}' is defined for ViT alone; choose 'san'")
        links, stream = [Link("patch_embed")], "patch_embed"
        for i, stage in enumerate(self.stages):
            dim = len(stage[0].norm1.weight)
            if i:
                merging = f"downsample.{i - 1}.reduction"
                links.append(Link(merging, stream, [*range(dim // 2)] * 4))
                stream = merging
            for j in range(len(stage)):
                attn, mlp = f"stages.{i}.{j}.attn", f"stages.{i}.{j}.mlp"
                links.append(Link(f"{attn}.qkv", stream))
                links.append(Link(f"{attn}.proj", f"{attn}.qkv", range(2 * dim, 3 * dim)))
                links.append(Link(f"{mlp}.fc1", f"{attn}.proj"))
                links.append(Link(f"{mlp}.fc2", f"{mlp}.fc1"))
                stream = f"{mlp}.fc2"
        return links


# ---------------------------------------------------------------------------------------- LLaMA


class RMSNorm(nn.Module):
    """weight ⊙ x / √(mean(x²) + ε) over channels, computed in float32 at least, x's type again.

    The weight is wanted in float32 even where the layers around are bfloat16: it may be trained.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * (wide * scale)).to(x.dtype)


def rotary_frequencies(
    head_dim: int, base: float, scaling: dict | None, device: torch.device | None = None
) -> Tensor:
    """f_i = base^(−2i/d) for i = 0 … d/2 − 1, in float32, stretched to longer texts by `scaling`.

    linear: f / factor. llama3: f where it turns often within the original context, f / factor
    where it turns seldom, between the two in proportion to its number of turns.
    Raises ValueError for another kind of scaling, KeyError for one that lacks a number.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1 / base ** (steps / head_dim)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    raise ValueError(f"rope scaling '{kind}' is not supported; use a model with linear or llama3")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: turn each pair of channels (i, i + d/2) of x, B×h×N×d, by its angle."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # B×1×N×d/2, B or 1
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GroupedAttention(nn.Module):
    """softmax(q kᵀ / √d) v with rotary positions; h / kv_heads query heads share each k and v."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple, mask: Tensor | None, past: tuple | None
    ) -> tuple[Tensor, tuple]:
        """x, B×N×C → what attention writes, B×N×C, and the keys and values of past and present.

        rotation: cosines and sines, B×1×N×d/2; mask: as in LLaMA.features; past and what is given
        back: keys and values, B×kv_heads×(P+N)×d.
        """
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # B h N d
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # repeated here: not every fast kernel takes fewer k than q; a view where there is one each
        repeats = q.shape[1] // k.shape[1]
        keys, values = (
            t.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (k, v)
        )
        # a single token may look at all there is
        causal = mask is None and q.shape[2] > 1
        z = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
        return self.o_proj(z.transpose(1, 2).flatten(2)), (k, v)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLaMABlock(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps)
        self.attn = GroupedAttention(dim, heads, kv_heads, head_dim)
        self.norm2 = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, hidden)

    def forward(
        self, x: Tensor, rotation: tuple, mask: Tensor | None, past: tuple | None
    ) -> tuple[Tensor, tuple]:
        z, present = self.attn(self.norm1(x), rotation, mask, past)
        x = x + z
        return x + self.mlp(self.norm2(x)), present


class LLaMA(nn.Module):
    """LLaMA (Touvron et al. 2023): a causal transformer with rotary positions, RMSNorm, SwiGLU.

    tied: head and embedding share one weight. head_dim: d, dim / heads if None. context: the
    longest text it is made for, which nothing here enforces. LLaMA(**model.numbers) is another
    model of the same size. Raises ValueError if the numbers do not fit.
    """

    # where the papers compared with LoRA and DoRA put them (the setting of LLM-Adapters)
    LOW_RANK = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        context: int,
        tied: bool = False,
        head_dim: int | None = None,
        eps: float = 1e-5,
        rope_base: float = 10000.0,
        rope_scaling: dict | None = None,
    ) -> None:
        super().__init__()
        self.numbers = dict(
            vocab=vocab,
            dim=dim,
            depth=depth,
            heads=heads,
            kv_heads=kv_heads,
            hidden=hidden,
            context=context,
            tied=tied,
            head_dim=head_dim,
            eps=eps,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
        )
        if head_dim is None and dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads do not divide among {kv_heads} key-value heads")
        head_dim = head_dim or dim // heads
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels, not {head_dim}")
        rotary_frequencies(head_dim, rope_base, rope_scaling)  # raises here, not at the first use
        self.context, self.head_dim = context, head_dim
        self.heads, self.kv_heads = heads, kv_heads
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            LLaMABlock(dim, heads, kv_heads, head_dim, hidden, eps) for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        initialise(self, std=dim**-0.5)  # 0.02 is too little for a narrow model [us]

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list | None = None,
    ) -> Tensor:
        """Token numbers, B×N → vectors after the last norm, B×N×C.

        positions: B×N; None counts on from the cache's length P (0 without one).
        mask: bool, broadcastable to B×1×N×(P+N), True where a token may look; None is causal.
        cache: [None] * depth at first; each call appends the keys, rotated, and values of its
        tokens: one pair, each B×kv_heads×(P+N)×d, a block.
        """
        count = tokens.shape[1]
        past = 0 if cache is None or cache[0] is None else cache[0][0].shape[2]
        if positions is None:
            positions = torch.arange(past, past + count, device=tokens.device)[None]
        if mask is None and past and count > 1:  # is_causal knows of no past
            seen = torch.ones(count, past + count, dtype=torch.bool, device=tokens.device)
            mask = seen.tril(past)
        # made anew and no buffer, which `model.to(torch.bfloat16)` would round: angles need float32
        scaling = self.numbers["rope_scaling"]
        frequencies = rotary_frequencies(
            self.head_dim, self.numbers["rope_base"], scaling, tokens.device
        )
        angles = positions[:, None, :, None] * frequencies  # B×1×N×d/2
        rotation = angles.cos(), angles.sin()
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x, present = block(x, rotation, mask, None if cache is None else cache[i])
            if cache is not None:
                cache[i] = present
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list | None = None,
    ) -> Tensor:
        """As `features`, then the head: logits, B×N×V."""
        return self.head(self.features(tokens, positions, mask, cache))

    def links(self, wiring: str = "san") -> list[Link]:
        """The links of every layer but the head.

        layer             anterior
        q, k, v_proj      the last layer that wrote to the stream: the previous block's down_proj
                          (block 0: none, the embedding is no layer)
        o_proj            v_proj, each channel repeated for the query heads that share it:
                          attention mixes tokens, not channels, so A (γ ⊙ v) = γ ⊙ (A v) is exact
        gate, up_proj     o_proj, through residual and norm
        down_proj         up_proj: silu(g) ⊙ (γ ⊙ u) = γ ⊙ (silu(g) ⊙ u) is exact

        Raises ValueError for a wiring other than "san": the authors' v1 code wires ViTs.
        """
        if wiring != "san":
            raise ValueError(f"wiring '{wiring}' is defined for ViT alone; choose 'san'")
        group, d = self.heads // self.kv_heads, self.head_dim
        value_of = [head // group * d + c for head in range(self.heads) for c in range(d)]
        links, stream = [], None
        for i in range(len(self.blocks)):
            attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            links += [Link(f"{attn}.{name}_proj", stream) for name in "qkv"]
            links.append(Link(f"{attn}.o_proj", f"{attn}.v_proj", value_of))
            links += [Link(f"{mlp}.{name}_proj", f"{attn}.o_proj") for name in ("gate", "up")]
            links.append(Link(f"{mlp}.down_proj", f"{mlp}.up_proj"))
            stream = f"{mlp}.down_proj"
        return links


@torch.no_grad()
def generate(model: LLaMA, tokens: list[int], count: int, stop: int | None = None) -> list[int]:
    """Up to `count` tokens that follow a prompt of one or more, the likeliest each time.

    It ends before `stop`; the context's length is the caller's concern. Source: greedy decoding.
    """
    cache, new = [None] * len(model.blocks), []
    x = torch.tensor([tokens], device=model.embed.weight.device)  # 1×N, then 1×1
    for _ in range(count):
        token = model.head(model.features(x, cache=cache)[:, -1]).argmax().item()
        if token == stop:
            break
        new.append(token)
        x = x.new_tensor([[token]])
    return new


# ------------------------------------------------------------------------------ sizes, building


def initialise(model: nn.Module, std: float = 0.02) -> None:
    """Weights from a normal distribution, biases zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


# A LLaMA but for its vocabulary, which the tokenizer gives. It is pre-trained on 128 tokens at a
# time; rotary positions allow more, and the real tasks spelled in bytes need it.
LLAMA_MICRO = dict(dim=128, depth=4, heads=4, kv_heads=2, hidden=384, context=2048)

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
    "swin_micro": (
        Swin,
        32,
        dict(patch=2, window=4, dim=32, depths=(2, 2, 2), heads=(2, 4, 8), drop_path=0.0),
    ),
    "swin_tiny": (
        Swin,
        224,
        dict(patch=4, window=7, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), drop_path=0.2),
    ),
    "swin_base": (
        Swin,
        224,
        dict(patch=4, window=7, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5),
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
