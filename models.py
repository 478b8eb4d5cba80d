"""Five backbones written by hand, with their links for `san.attach`.

ViT, ConvNeXt and Swin read pictures, LLaMA reads text, LLaVA reads pictures within a text.

In each, `features` gives one vector per image or per token, `head` makes logits of it, and `links`
says which layer is anterior to which. γ acts twice: on the anterior's output z, and on the columns
of the posterior. Whether this propagation brings new functions within reach, and not only another
course of training, depends on f, what lies between the two layers:

exact   f(γ ⊙ z) = γ ⊙ f(z), and nothing but the posterior reads z. No new functions: z is scaled
        by γ² in effect [P], and feature scaling alone could scale it so.
norm    A norm that only the posterior reads, or posteriors of the same anterior. No new functions
        if it is trained: its weight and bias, times γ, do the same [us]. New ones if it is frozen.
GELU    New functions [P]: γ ⊙ GELU(γ ⊙ z) is GELU(k ⊙ z) for no k, unless γ is 0 or 1.

The residual stream is the sum of what many layers wrote, so a layer that reads it has no single
anterior. Our rule is its last writer, the layer that added to it last [us]. That is a convention,
not an identity: γ scales only what the last writer adds, its propagated copy the whole stream,
after the norm if there is one. In a ViT's first block the stream holds the class token too, which
patch_embed did not write.

B images or texts, N tokens, C channels (`dim`), h heads of d channels each, V words, H×W pixels;
`depth` counts blocks; `image_size` and `patch` are pixels a side, `window` is places a side.
[P] the paper, [C] its authors' v1 code, [us] our reading or choice; san.py names them in full.
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

    def stream(self, images: Tensor) -> Tensor:
        """Normalised pixels, B×3×H×W → what the blocks write, B×(1+N)×C, the class token first."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # B N C
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """Normalised pixels, B×3×H×W → the class token after the last norm, B×C."""
        return self.norm(self.stream(images)[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self, wiring: str = "san") -> list[Link]:
        """The links of every layer but the head.

        layer      anterior                              between
        qkv        last writer: patch_embed, then fc2    norm
        attn.proj  the value third of qkv                attention, exact: A (γ ⊙ v) = γ ⊙ (A v),
                                                         since A mixes tokens, not channels
        fc1        last writer: attn.proj                norm
        fc2        fc1                                   GELU

        Propagated nowhere: the γ of q, of k, and of the last fc2. With trained norms only fc2
        reaches functions that feature scaling cannot [us].

        wiring: "san" is this table [us]. "authors" [C] differs in two rows: qkv reads patch_embed
        in every block, attn.proj nothing; so no γ of a qkv or fc2 is propagated.
        Raises ValueError for another wiring.
        """
        if wiring not in ("san", "authors"):
            raise ValueError(f"wiring '{wiring}' is unknown; choose 'san' or 'authors'")
        dim = self.position.shape[-1]
        value_third = range(2 * dim, 3 * dim)  # q, k and v are qkv's outputs in a row
        links, last_writer = [Link("patch_embed")], "patch_embed"
        for i in range(len(self.blocks)):
            attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            if wiring == "san":
                links.append(Link(f"{attn}.qkv", last_writer))
                links.append(Link(f"{attn}.proj", f"{attn}.qkv", value_third))
            else:
                links.append(Link(f"{attn}.qkv", "patch_embed"))
                links.append(Link(f"{attn}.proj"))
            links.append(Link(f"{mlp}.fc1", f"{attn}.proj"))
            links.append(Link(f"{mlp}.fc2", f"{mlp}.fc1"))
            last_writer = f"{mlp}.fc2"
        return links


# ------------------------------------------------------------------------------------- ConvNeXt


def stochastic_depth(z: Tensor, rate: float) -> Tensor:
    """A branch's output z, B×…×…×…; per image, 0 with probability `rate`, else z / (1 − rate)."""
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

    The pointwise convolutions are linear layers on channels-last images. `layer_scale` is
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
    """ConvNeXt (Liu et al. 2022): a stem, then stages of blocks with a halving convolution between.

    depths, dims: one number of blocks and one of channels per stage; patch: the stem's, 4 but for
    small pictures.
    """

    def __init__(
        self,
        outputs: int,
        image_size: int,
        depths: tuple,
        dims: tuple,
        drop_path: float,
        patch: int = 4,
    ) -> None:
        super().__init__()
        smallest = patch * 2 ** (len(dims) - 1)  # each later stage divides a side by 2
        if image_size < smallest:
            raise ValueError(f"image size {image_size} is too small; take {smallest} or more")
        self.image_size = image_size
        # deeper blocks drop more often; on the CPU, since the default device may be "meta"
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dims[0], kernel_size=patch, stride=patch), LayerNorm2d(dims[0], eps=1e-6)
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
        """Normalised pixels, B×3×H×W → the last norm of the average over places, B×C."""
        # channels-last, since the norms and pointwise layers want it: about 1.5 times as fast
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # B C H/p W/p
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample[i - 1](x) if i else x)
        return self.norm(x.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self) -> list[Link]:
        """The links of every layer but the head, each to the layer before it [us].

        layer            anterior                                  between
        dwconv           last writer: stem, downsample or pwconv2  the stream, no norm of its own
        pwconv1          dwconv                                    norm
        pwconv2          pwconv1                                   GELU
        downsample conv  last writer: the stage's last pwconv2     norm

        No row is exact. Propagated nowhere: the γ of the last pwconv2. With trained norms pwconv2
        reaches functions that feature scaling cannot; dwconv does so only without a shift. It is
        depthwise, so γ' makes w ∗ x + b into γ' ⊙ (w ∗ x) + b: its own γ and β together can do
        that, its γ alone cannot [us].
        """
        links, last_writer = [Link("stem.0")], "stem.0"
        for i, stage in enumerate(self.stages):
            if i:
                links.append(Link(f"downsample.{i - 1}.1", last_writer))
                last_writer = f"downsample.{i - 1}.1"
            for j in range(len(stage)):
                block = f"stages.{i}.{j}"
                links.append(Link(f"{block}.dwconv", last_writer))
                links.append(Link(f"{block}.pwconv1", f"{block}.dwconv"))
                links.append(Link(f"{block}.pwconv2", f"{block}.pwconv1"))
                last_writer = f"{block}.pwconv2"
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


def offset_index(window: int) -> Tensor:
    """w²×w²: for two places of a window, which of the (2w − 1)² offsets leads from one to other."""
    # place (y, x) becomes y (2w − 1) + x, so that the difference of two gives their offset
    place = torch.arange(window**2)
    place = place // window * (2 * window - 1) + place % window
    return place[:, None] - place + 2 * window * (window - 1)  # from 0 on


class WindowAttention(Attention):
    """Attention inside windows of w×w places, softmax(q kᵀ / √d + bias) v, on B×H×W×C.

    The bias is learned, one number per head and per offset from one place of a window to another,
    (2w − 1)² offsets. The grid is first padded with zeros to whole windows. With a shift s it is
    then rolled up and left by s, cyclically, so that windows straddle the borders of the unshifted
    ones; attention is masked between places that only the roll made neighbours.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int):
        super().__init__(dim, heads)
        self.window, self.shift = window, shift
        self.offset_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.offset_bias, std=0.02)
        self.register_buffer("index", offset_index(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w, (height, width) = self.window, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        sides = x.shape[1:3]
        # a side that one window holds is not shifted
        shifts = [self.shift if side > w else 0 for side in sides]
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
        """n×w²×w², True for two places of a window that are no neighbours in the image.

        The roll moved the first s rows and columns to the end: of such two places, one is among
        those and the other is not.
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
    """The channels of 2×2 neighbours side by side, 4C, then reduction(norm(x)): 4C → 2C."""

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
    dim: channels of the first stage; depths, heads: one number of blocks and of heads per stage.
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
        """Normalised pixels, B×3×H×W → the average over places of the last norm, B×C."""
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))  # B H/p W/p C
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample[i - 1](x) if i else x)
        return self.norm(x).mean((1, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def links(self) -> list[Link]:
        """The links of every layer but the head [us].

        layer      anterior                                           between
        qkv        last writer: patch_embed or reduction, then fc2    norm
        attn.proj  the value third of qkv                             attention, exact as in ViT:
                                                                      windows, shifts and biases
                                                                      decide which tokens mix
        fc1        last writer: attn.proj                             norm
        fc2        fc1                                                GELU
        reduction  last writer: the stage's last fc2, each channel    norm
                   repeated for the 4 neighbours side by side

        Propagated nowhere: the γ of q, of k, and of the last stage's last fc2. With trained norms
        only fc2 reaches functions that feature scaling cannot [us].
        """
        links, last_writer = [Link("patch_embed")], "patch_embed"
        for i, stage in enumerate(self.stages):
            dim = len(stage[0].norm1.weight)
            if i:
                merging = f"downsample.{i - 1}.reduction"
                before = dim // 2  # channels of the stage before
                links.append(Link(merging, last_writer, [*range(before)] * 4))
                last_writer = merging
            for j in range(len(stage)):
                attn, mlp = f"stages.{i}.{j}.attn", f"stages.{i}.{j}.mlp"
                links.append(Link(f"{attn}.qkv", last_writer))
                links.append(Link(f"{attn}.proj", f"{attn}.qkv", range(2 * dim, 3 * dim)))
                links.append(Link(f"{mlp}.fc1", f"{attn}.proj"))
                links.append(Link(f"{mlp}.fc2", f"{mlp}.fc1"))
                last_writer = f"{mlp}.fc2"
        return links


# ---------------------------------------------------------------------------------------- LLaMA


class RMSNorm(nn.Module):
    """weight ⊙ x / √(mean(x²) + ε) over channels, computed in float32 at least, x's type again.

    The weight is kept in float32 even where the layers around are bfloat16: it may be trained.
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
        # k and v per query head: not every fast kernel repeats them; no copy where repeats is 1
        repeats = q.shape[1] // k.shape[1]
        keys, values = (
            t.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (k, v)
        )
        # a single token may see all that came before it
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

    tied: head and embedding share one weight. head_dim: d; None is dim / heads. context: the
    longest text it is made for, in tokens, which nothing here enforces. `config` holds these
    arguments: LLaMA(**model.config) is another model of the same size.
    Raises ValueError if they do not fit together.
    """

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
        self.config = dict(
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
        if not 0 < depth <= 1000:
            raise ValueError(f"no LLaMA has {depth} blocks")
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
        cache: [None] * depth at first; each call appends its tokens' rotated keys and values, one
        pair per block, each B×kv_heads×(P+N)×d.
        """
        return self.read(self.embed(tokens), positions, mask, cache)

    def read(
        self, x: Tensor, positions: Tensor | None, mask: Tensor | None, cache: list | None
    ) -> Tensor:
        """As `features`, from the vectors that stand for the tokens, B×N×C."""
        count = x.shape[1]
        past = 0 if cache is None or cache[0] is None else cache[0][0].shape[2]
        if positions is None:
            positions = torch.arange(past, past + count, device=x.device)[None]
        if mask is None and past and count > 1:  # is_causal knows of no past
            seen = torch.ones(count, past + count, dtype=torch.bool, device=x.device)
            mask = seen.tril(past)
        # Angles need float32. `model.to(torch.bfloat16)` would round frequencies kept in a buffer,
        # so they are computed per call.
        base, scaling = self.config["rope_base"], self.config["rope_scaling"]
        frequencies = rotary_frequencies(self.head_dim, base, scaling, x.device)
        angles = positions[:, None, :, None] * frequencies  # B×1×N×d/2
        rotation = angles.cos(), angles.sin()
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
        **shown: Tensor,
    ) -> Tensor:
        """As `features`, then the head: logits, B×N×V. shown: a LLaVA's `images`."""
        return self.head(self.features(tokens, positions, mask, cache, **shown))

    def links(self) -> list[Link]:
        """The links of every layer but the head [us].

        layer          anterior                               between
        q, k, v_proj   last writer: the previous block's      norm
                       down_proj; in block 0 none, since the
                       embedding has no γ
        o_proj         v_proj, each channel repeated for the  attention, exact as in ViT:
                       query heads that share it              A (γ ⊙ v) = γ ⊙ (A v)
        gate, up_proj  last writer: o_proj                    norm
        down_proj      up_proj                                the gate, exact: silu(g) ⊙ (γ ⊙ u)
                                                              = γ ⊙ (silu(g) ⊙ u)

        Propagated nowhere: the γ of every q, k and gate_proj, and of the last down_proj. With
        trained norms no link reaches functions that feature scaling cannot [us].
        """
        # value_of[h·d + c] = ⌊h / group⌋·d + c: the channel of v_proj at o_proj's input h·d + c
        group, d = self.heads // self.kv_heads, self.head_dim
        value_of = [h // group * d + c for h in range(self.heads) for c in range(d)]
        links, last_writer = [], None
        for i in range(len(self.blocks)):
            attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            links += [Link(f"{attn}.{name}_proj", last_writer) for name in "qkv"]
            links.append(Link(f"{attn}.o_proj", f"{attn}.v_proj", value_of))
            links += [Link(f"{mlp}.{name}_proj", f"{attn}.o_proj") for name in ("gate", "up")]
            links.append(Link(f"{mlp}.down_proj", f"{mlp}.up_proj"))
            last_writer = f"{mlp}.down_proj"
        return links


# ---------------------------------------------------------------------------------------- LLaVA


class Projector(nn.Module):
    """Two layers with a GELU between, from the patches' channels to the LLaMA's."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(inputs, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LLaVA(LLaMA):
    """LLaVA-1.5 (Liu et al. 2024): a LLaMA that reads pictures where they stand in its text.

    A ViT without its class token, last norm and head gives vectors of patches, the projector brings
    them to the LLaMA's width, and they take the places of the tokens `picture`: each picture has
    `places` of them in a row. All else, positions, masks and the cache, is the LLaMA's.
    tower: the ViT's arguments, without outputs. LLaVA-1.5 reads its CLIP before the last block: the
    tower ends with the block that is read.
    pool: p×p neighbouring patches are read as one, side by side; 1 in LLaVA-1.5, more as in
    Qwen2-VL. numbers: LLaMA's arguments. Raises ValueError if all these do not fit together.
    """

    def __init__(self, tower: dict, picture: int, pool: int = 1, **numbers) -> None:
        super().__init__(**numbers)
        if not 0 < tower["depth"] <= 1000:
            raise ValueError(f"no tower has {tower['depth']} blocks")
        self.config |= dict(tower=tower, picture=picture, pool=pool)
        self.tower = ViT(outputs=1, **tower)
        self.tower.norm = self.tower.head = nn.Identity()
        self.side = tower["image_size"] // tower["patch"]
        if self.side % pool or not 0 <= picture < numbers["vocab"]:
            raise ValueError(
                f"{self.side} patches a side are to be read {pool} at a time, and token {picture} "
                f"of {numbers['vocab']} is to stand for them"
            )
        self.picture, self.pool, self.places = picture, pool, (self.side // pool) ** 2
        self.projector = Projector(tower["dim"] * pool**2, numbers["dim"])
        initialise(self.projector, std=numbers["dim"] ** -0.5)

    def see(self, images: Tensor) -> Tensor:
        """Normalised pixels, K×3×H×W → what stands for the pictures in a text, K×places×C."""
        patches = self.tower.stream(images)[:, 1:].unflatten(1, (self.side, -1))
        return self.projector(to_windows(patches, self.pool).flatten(2))

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """As LLaMA's, with `images`, K×3×H×W, in the order in which they stand in the tokens.

        A text of the batch may have any number of pictures, or none. Without images the tokens
        `picture` are tokens as any other. Raises ValueError if K pictures do not fill their places.
        """
        x = self.embed(tokens)
        if images is not None:
            place = tokens == self.picture
            if (count := place.sum()) != len(images) * self.places:
                raise ValueError(f"{len(images)} pictures do not fill {count} places in the text")
            x = x.masked_scatter(place[..., None], self.see(images).to(x.dtype))
        return self.read(x, positions, mask, cache)

    def links(self, tower: bool = False, projector: bool = True) -> list[Link]:
        """LLaMA's links; with `tower` the ViT's too; with `projector` also [us]:

        layer          anterior                                    between
        projector.fc1  last writer: with `tower`, the ViT's last   the stream, no norm; each channel
                       fc2, else none                              repeated for the pooled patches
        projector.fc2  projector.fc1                               GELU
        block 0's      last writer: projector.fc2, which LLaMA     norm
        q, k, v_proj   alone does not have

        Tokens stand in block 0's stream too, which the projector did not write, as in a ViT the
        class token. A part that is frozen or trained whole is left out, and its γ with it: without
        the projector nothing reads the tower's last γ, and block 0's q, k and v read none.
        """
        links = []
        if tower:
            links += [
                Link(f"tower.{layer}", anterior and f"tower.{anterior}", index)
                for layer, anterior, index in self.tower.links()
            ]
        if projector:
            last, dim = links[-1].layer if tower else None, self.config["tower"]["dim"]
            index = [*range(dim)] * self.pool**2 if tower and self.pool > 1 else None
            links.append(Link("projector.fc1", last, index))
            links.append(Link("projector.fc2", "projector.fc1"))
        writer = "projector.fc2" if projector else None
        for layer, anterior, index in super().links():
            first = anterior is None and layer.startswith("blocks.0.attn.")
            links.append(Link(layer, writer if first else anterior, index))
        return links


def generate(
    model: LLaMA, prompt: list[int], count: int, stop: int | None = None, **shown: Tensor
) -> list[int]:
    """Greedy decoding: up to `count` tokens that follow the prompt, the likeliest each time.

    The text ends before the token `stop`. The prompt has one token or more; whether it fits the
    model's context is the caller's concern. shown: a LLaVA's `images`, read with the prompt.
    """
    return generate_batch(model, [prompt], count, stop, **shown)[0]


@torch.no_grad()
def generate_batch(
    model: LLaMA, prompts: list[list[int]], count: int, stop: int | None = None, **shown: Tensor
) -> list[list[int]]:
    """`generate` for several prompts at once: per prompt the tokens that it has alone."""
    longest, device = max(map(len, prompts)), model.embed.weight.device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    x = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    places = torch.arange(longest, device=device) - padding[:, None]  # B×N, then B×1
    real = places >= 0  # the padding, at the left, sees itself alone, and nobody sees it
    mask = torch.ones(longest, longest, dtype=torch.bool, device=device).tril() & real[:, None]
    mask |= torch.eye(longest, dtype=torch.bool, device=device)  # B×N×N, then B×1×(P+1)
    cache, new = [None] * len(model.blocks), []
    ended = torch.zeros_like(padding, dtype=torch.bool)
    for _ in range(count):
        own = None if real.all() else mask[:, None]
        z = model.features(x, places.clamp(min=0), own, cache, **shown)[:, -1]
        shown = {}  # the cache has seen them
        x = model.head(z).argmax(-1, keepdim=True)  # B×1
        ended |= x[:, 0] == stop
        if ended.all():
            break
        new.append(x)
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
        mask, places = real[:, None], places[:, -1:] + 1
    rows = torch.cat([x[:, :0], *new], 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


# ------------------------------------------------------------------------------ sizes, building


def initialise(model: nn.Module, std: float = 0.02) -> None:
    """Weights from a normal distribution, biases zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


# LLaMA's config but for `vocab`, which the tokenizer gives. It is pre-trained on 128 tokens at a
# time; rotary positions allow more, and the real tasks spelled in bytes need it.
LLAMA_MICRO = dict(dim=128, depth=4, heads=4, kv_heads=2, hidden=384, context=2048)

# LLaVA's, but for `vocab` and `picture`: vit_micro is the tower, 4 of its patches are read as one
LLAVA_MICRO = dict(
    tower=dict(image_size=32, patch=4, dim=96, depth=4, heads=3),
    pool=2,
    **LLAMA_MICRO | dict(context=512),
)

# name: class, image size it is made for, and its config, the class's other arguments
SIZES = {
    "vit_micro": (ViT, 32, dict(patch=4, dim=96, depth=4, heads=3)),
    "vit_mini": (ViT, 32, dict(patch=4, dim=128, depth=6, heads=4)),
    "vit_tiny": (ViT, 224, dict(patch=16, dim=192, depth=12, heads=3)),
    "vit_s16": (ViT, 224, dict(patch=16, dim=384, depth=12, heads=6)),
    "vit_b16": (ViT, 224, dict(patch=16, dim=768, depth=12, heads=12)),
    "vit_l16": (ViT, 224, dict(patch=16, dim=1024, depth=24, heads=16)),
    "convnext_micro": (ConvNeXt, 32, dict(depths=(2, 2, 2), dims=(40, 80, 160), drop_path=0.0)),
    "convnext_mini": (
        ConvNeXt,
        32,
        dict(depths=(1, 1, 3, 1), dims=(32, 64, 128, 256), drop_path=0.0, patch=2),
    ),
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
    "swin_mini": (
        Swin,
        32,
        dict(patch=2, window=4, dim=32, depths=(2, 2, 4), heads=(2, 4, 8), drop_path=0.0),
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
    """The model `name` of SIZES with random weights and `outputs` logits, for images of a size.

    Raises ValueError if the name is unknown or the image size does not fit the model.
    """
    if name not in SIZES:
        raise ValueError(f"model '{name}' is unknown; choose one of {', '.join(SIZES)}")
    model_class, default_size, config = SIZES[name]
    return model_class(outputs, image_size or default_size, **config)
