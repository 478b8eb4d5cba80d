"""Weights from files: published ones in their layouts, brought under our names, and our own.

`backbone_state` gives what --weights names, from a file or from the cache of downloads, and
`load_backbone` puts it into a model of models.py. Whose a layout is decides its names alone: the
architectures are the same. LLaMA's are in llama.py. What a run saved, for a model of others:
    python -m lab.checkpoints runs/…/merged.pt --layout timm out.pt
"""

import argparse
import base64
import hashlib
import http.client
import importlib.util
import math
import re
import sys
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import san
from models import offset_index

# what pictures are normalised with, by channel: every published backbone but the authors' ViT
# was trained on pixels, 0 … 1, less MEAN and divided by STD
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# model: torchvision's name of its weights
IMAGENET1K = {
    "vit_b16": "ViT_B_16_Weights.IMAGENET1K_V1",
    "vit_l16": "ViT_L_16_Weights.IMAGENET1K_V1",
    "convnext_tiny": "ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
    "convnext_base": "ConvNeXt_Base_Weights.IMAGENET1K_V1",
    "swin_tiny": "Swin_T_Weights.IMAGENET1K_V1",
    "swin_base": "Swin_B_Weights.IMAGENET1K_V1",
}
# model: the address its authors published it at
IMAGENET21K = {
    "vit_b16": "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz",
    "vit_l16": "https://storage.googleapis.com/vit_models/imagenet21k/ViT-L_16.npz",
    "convnext_tiny": "https://dl.fbaipublicfiles.com/convnext/convnext_tiny_22k_224.pth",
    "convnext_base": "https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth",
    "swin_tiny": "https://github.com/SwinTransformer/storage/releases/download/v1.0.8/"
    "swin_tiny_patch4_window7_224_22k.pth",
    "swin_base": "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_base_patch4_window7_224_22k.pth",
}


# ----------------------------------------------------------------------------------------- names

# (other people's, our) names, tried in this order on the start of every key; {} is a number
BLOCK, STAGE = "blocks.{}.", "stages.{}.{}."
VIT_NAMES = [
    ("encoder.pos_embedding", "position"),
    ("conv_proj", "patch_embed"),
    *(
        ("encoder.layers.encoder_layer_{}." + theirs, BLOCK + ours)
        for theirs, ours in (
            ("ln_", "norm"),
            ("self_attention.in_proj_", "attn.qkv."),
            ("self_attention.out_proj", "attn.proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
            ("mlp.linear_1", "mlp.fc1"),  # in the published files
            ("mlp.linear_2", "mlp.fc2"),
        )
    ),
    ("encoder.ln", "norm"),
    ("heads.head", "head"),
]
# torchvision numbers the stages of these two and the halvings between them in one row:
# 1, 3, 5, 7 are stages 0 to 3, and 2, 4, 6 are halvings 0 to 2
HALVINGS = [(f"features.{2 * i + 2}.", f"downsample.{i}.") for i in range(3)]
CONVNEXT_NAMES = [
    ("features.0.", "stem."),
    *(
        (f"features.{2 * i + 1}.{{}}.{theirs}", f"stages.{i}.{{}}.{ours}")
        for i in range(4)
        for theirs, ours in (
            ("block.0", "dwconv"),
            ("block.2", "norm"),
            ("block.3", "pwconv1"),
            ("block.5", "pwconv2"),
            ("layer_scale", "layer_scale"),
        )
    ),
    *HALVINGS,
    ("classifier.0", "norm"),
    ("classifier.2", "head"),
]
SWIN_NAMES = [
    ("features.0.0", "patch_embed"),
    ("features.0.2", "patch_norm"),
    *(
        (f"features.{2 * i + 1}.{{}}.{theirs}", f"stages.{i}.{{}}.{ours}")
        for i in range(4)
        for theirs, ours in (
            ("attn.relative_position_bias_table", "attn.offset_bias"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
            ("", ""),
        )
    ),
    *HALVINGS,
]
# the authors' own
VIT_AUTHORS = [
    ("cls", "class_token"),
    ("embedding", "patch_embed"),
    ("Transformer/posembed_input/pos_embedding", "position"),
    *(
        ("Transformer/encoderblock_{}/" + theirs, BLOCK + ours)
        for theirs, ours in (
            ("LayerNorm_0", "norm1"),
            ("MultiHeadDotProductAttention_1/out", "attn.proj"),
            ("MultiHeadDotProductAttention_1/", "attn."),
            ("LayerNorm_2", "norm2"),
            ("MlpBlock_3/Dense_0", "mlp.fc1"),
            ("MlpBlock_3/Dense_1", "mlp.fc2"),
        )
    ),
    ("Transformer/encoder_norm", "norm"),
]
CONVNEXT_AUTHORS = [
    ("downsample_layers.0.", "stem."),
    *((f"downsample_layers.{i + 1}.", f"downsample.{i}.") for i in range(3)),
    ("stages.{}.{}.gamma", STAGE + "layer_scale"),
]
SWIN_BLOCKS = [
    ("patch_embed.proj", "patch_embed"),
    ("patch_embed.norm", "patch_norm"),
    ("layers.{}.blocks.{}.attn.relative_position_bias_table", STAGE + "attn.offset_bias"),
    ("layers.{}.blocks.{}.", STAGE),
]
SWIN_AUTHORS = [*SWIN_BLOCKS, ("layers.{}.downsample.", "downsample.{}.")]
# timm's
VIT_TIMM = [
    ("cls_token", "class_token"),
    ("pos_embed", "position"),
    ("patch_embed.proj", "patch_embed"),
]
CONVNEXT_TIMM = [
    ("stages.{}.blocks.{}.conv_dw", STAGE + "dwconv"),
    ("stages.{}.blocks.{}.mlp.fc", STAGE + "pwconv"),
    ("stages.{}.blocks.{}.gamma", STAGE + "layer_scale"),
    ("stages.{}.blocks.{}.", STAGE),
    *((f"stages.{i + 1}.downsample.", f"downsample.{i}.") for i in range(3)),
    ("head.norm", "norm"),
    ("head.fc", "head"),
]
SWIN_TIMM = [
    *SWIN_BLOCKS,
    *((f"layers.{i + 1}.downsample.", f"downsample.{i}.") for i in range(3)),
    ("head.fc", "head"),
]
# whose names `to_layout` writes: of ViT, ConvNeXt, Swin
TARGETS = {
    "timm": (VIT_TIMM, CONVNEXT_TIMM, SWIN_TIMM),
    "torchvision": (VIT_NAMES, CONVNEXT_NAMES, SWIN_NAMES),
}


def rename(key: str, names: list[tuple[str, str]], back: bool = False) -> str:
    """`key` with its start replaced by the first pair of `names` that fits it, if any does.

    back: our names are replaced by theirs.
    """
    for theirs, ours in names:
        old, new = (ours, theirs) if back else (theirs, ours)
        if found := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), key):
            return new.format(*found.groups()) + key[found.end() :]
    return key


def distinct(entries: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict of renamed entries. Raises ValueError if two of them came by one name."""
    state = {}
    for name, value in entries:
        if name in state:
            raise ValueError(f"holds two entries for {name}")
        state[name] = value
    return state


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of torchvision's ViT, ConvNeXt or Swin under our names and shapes."""
    if "conv_proj.weight" in state:
        names = VIT_NAMES
    elif "features.1.0.attn.relative_position_bias_table" in state:
        names = SWIN_NAMES
    else:
        names = CONVNEXT_NAMES
    converted = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):  # no weight: the window's size tells it
            continue
        key = rename(key, names)
        converted[key] = value.flatten() if key.endswith("layer_scale") else value
    return converted


def from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ConvNeXt's or Swin's authors under our names."""
    names = CONVNEXT_AUTHORS if "downsample_layers.0.0.weight" in state else SWIN_AUTHORS
    return distinct((rename(key, names), value) for key, value in state.items())


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's ViT, ConvNeXt or Swin under our names.

    timm has a Swin's merging at the start of the stage that it leads to, where Swin's authors, and
    timm before 0.9, have it at the end of the stage that it leaves. Where windows do not fill the
    grid, timm pads it after the shift and ours before: there alone the two compute differently.
    """
    if any(key.startswith("layers.") for key in state):
        names = SWIN_TIMM
    else:
        names = CONVNEXT_TIMM if any(key.startswith("stages.") for key in state) else VIT_TIMM
    return distinct((rename(key, names), value) for key, value in state.items())


def to_layout(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state dict of ours under the names of 'timm' or 'torchvision', whose model loads it.

    The inverse of from_timm and from_torchvision. Raises ValueError for what has no place there.
    """
    if any(key.endswith(".prompts") for key in state):
        raise ValueError(f"the prompts of vpt have no place in a model of {layout}")
    kinds = ("class_token", "stem.0.weight", "patch_norm.weight")
    kind = next((i for i, key in enumerate(kinds) if key in state), None)
    if kind is None:
        raise ValueError("holds no ViT, ConvNeXt or Swin of ours")
    converted = {rename(key, TARGETS[layout][kind], back=True): v for key, v in state.items()}
    if layout == "torchvision":
        for key, value in [*converted.items()]:
            if key.endswith("layer_scale"):
                converted[key] = value.view(-1, 1, 1)
            if key.endswith("bias_table"):
                window = (math.isqrt(len(value)) + 1) // 2
                converted[key.replace("bias_table", "index")] = offset_index(window).flatten()
    return converted


def from_vit_authors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of a ViT as its authors published it, in JAX, under our names and shapes.

    Their kernels have the outputs last, and attention's are split into h heads of d channels:
    query, key and value are C×h×d, out is h×d×C. Left out is the head, with the layer before it
    that only pre-training had. Their pixels are (x − 0.5) / 0.5: the patch embedding is made
    `for_our_pixels` [us].
    One difference is left: their code has GELU in its tanh form, within 0.0005 of ours.
    Raises KeyError, ValueError, TypeError or RuntimeError if the arrays are of something else.
    Source: github.com/google-research/vision_transformer, vit_jax/models_vit.py.
    """
    state = {}
    for key, array in arrays.items():
        if key.startswith(("head/", "pre_logits/")):
            continue
        if key.endswith("/kernel"):  # inputs × outputs, over however many axes either stretches
            array = array.reshape(-1, arrays[key.replace("/kernel", "/bias")].size).T
        elif key.endswith("/bias"):
            array = array.reshape(-1)
        name = re.sub("/(kernel|scale)$", ".weight", rename(key, VIT_AUTHORS))
        state[name.replace("/bias", ".bias")] = torch.from_numpy(array)

    for i in range(sum(name.endswith("attn.proj.weight") for name in state)):
        for kind in ("weight", "bias"):
            q, k, v = (state.pop(f"blocks.{i}.attn.{n}.{kind}") for n in ("query", "key", "value"))
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([q, k, v])

    sides = arrays["embedding/kernel"].shape[:3]  # height, width, 3
    weight = state["patch_embed.weight"].unflatten(1, sides).movedim(3, 1)  # C 3 height width
    own = for_our_pixels(weight, state["patch_embed.bias"], [0.5] * 3, [0.5] * 3)
    state["patch_embed.weight"], state["patch_embed.bias"] = own
    return state


def for_our_pixels(
    weight: Tensor, bias: Tensor, mean: list[float], std: list[float]
) -> tuple[Tensor, Tensor]:
    """A patch embedding W, b of pixels (x − mean) / std made one of ours, with M and S.

    W' = W ⊙ S / std and b' = b + Σ W (M − mean) / std, exactly since it pads nothing. W: C×3×h×w.
    """
    mean, std, m, s = (torch.tensor(own).view(3, 1, 1) for own in (mean, std, MEAN, STD))
    return weight * s / std, bias + (weight * (m - mean) / std).sum((1, 2, 3))


# ---------------------------------------------------------------------------------------- files

# where trainers keep a model's weights in a file; the first that is there is read, so that an
# average of them is read only where it is all there is
HOLDERS = (
    *("state_dict", "model", "model_state_dict", "module", "net"),
    *("state_dict_ema", "model_ema"),
)
# how an entry ends that is no weight: Swin's sizes tell two, and torch's AveragedModel counts
NO_WEIGHTS = ("attn_mask", "relative_position_index", "n_averaged")
# an entry that no layout further down has: what brings that layout under our names
LAYOUTS = {
    "conv_proj.weight": from_torchvision,
    "features.0.0.weight": from_torchvision,
    "downsample_layers.0.0.weight": from_authors,
    "layers.0.downsample.reduction.weight": from_authors,
    "layers.0.blocks.0.norm1.weight": from_timm,
    "stages.0.blocks.0.conv_dw.weight": from_timm,
    "patch_embed.proj.weight": from_timm,
    "patch_embed.weight": dict,  # ours, as it is
    "stem.0.weight": dict,
}


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, under our names, whichever layout they are in.

    A .npz is of ViT's authors. Any other is torch's: a state dict, or what a trainer left, which
    holds one by a name of HOLDERS, as it is or behind a wrapper's prefix. Its keys tell the layout:
    torchvision's, that of ConvNeXt's or Swin's authors, timm's, or ours. Which activation, pooling
    and pixel statistics its model had, no file says: they are taken to be ours, with MEAN and STD.
    Raises ValueError if it holds no weights or more than one model's, OSError if it is missing,
    broken or refused.
    """
    if Path(path).suffix == ".npz":
        try:
            return from_vit_authors(read_arrays(path))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} holds no ViT as its authors published it: {why}") from error
    state = read_state_dict(path)
    try:
        return under_our_names(state)
    except ValueError as error:
        raise ValueError(f"{path} {error}; save the model's state dict alone") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict that a torch file is, or holds by a name of HOLDERS; its keys as they are.

    Warns if it holds more than one, saying which is read. Raises as read_backbone.
    """
    # trainers keep their flags beside the weights, in a Namespace, which holds values and no code
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = san.read(path)
    while not is_state_dict(content):
        entries = content if isinstance(content, dict) else {type(content).__name__: None}
        held = [name for name in HOLDERS if isinstance(entries.get(name), dict)]
        if not held:
            odd = [str(key) for key, value in entries.items() if not is_state_dict({key: value})]
            raise ValueError(
                f"{path} holds no state dict of a model, but {', '.join(odd[:3]) or 'nothing'}; "
                "save the model's state dict alone"
            )
        if len(held) > 1:
            warnings.warn(
                f"{path} holds {' and '.join(held)}: {held[0]} is read; to read another, save it "
                "alone",
                stacklevel=3,
            )
        content = content[held[0]]
    return content


def is_state_dict(content: Any) -> bool:
    """Whether it is a dict, not empty, of tensors by their names."""
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def under_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict in any layout, and in whatever it was wrapped, under our names.

    torch.compile's _orig_mod. is left out wherever it stands; any other prefix, such as DDP's
    module. or Lightning's model., where every entry has it.
    Raises ValueError if there are entries beside the model's, such as a loss's or an average's.
    """
    state = distinct(
        (key.replace("_orig_mod.", ""), value)
        for key, value in state.items()
        if not key.endswith(NO_WEIGHTS)
    )
    for entry, convert in LAYOUTS.items():
        found = [key for key in state if f".{key}".endswith(f".{entry}")]
        if found:
            wrapped = max(found, key=len)  # so that a model beside it does not share its prefix
            prefix = wrapped.removesuffix(entry)
            beside = [key for key in state if not key.startswith(prefix)]
            if beside:
                raise ValueError(f"holds {wrapped} and {beside[0]}, which are not of one model")
            return convert({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; what is pickled in it is refused, since that could be code.

    Raises FileNotFoundError if it is missing, OSError if it is broken or holds anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise OSError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:  # numpy takes whatever it does not know for a pickle
        raise OSError(f"{path} is refused: it is no file of plain arrays") from error
    except (AttributeError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path} is broken or no .npz file; fetch it again") from error


def backbone_state(weights: str | Path, name: str) -> dict[str, Tensor]:
    """What --weights names for the model `name`: imagenet1k, imagenet21k or a file; in our names.

    Raises ValueError if there is none for that model, OSError if it cannot be fetched or read.
    """
    if weights == "imagenet1k":
        return from_torchvision(imagenet1k(name))
    return read_backbone(imagenet21k(name) if weights == "imagenet21k" else weights)


def imagenet1k(name: str) -> dict[str, Tensor]:
    """torchvision's weights of the model `name`, as they are; downloaded if not in the cache."""
    import torchvision  # here, since it takes seconds and language has no use for it

    weights = torchvision.models.get_weight(published("imagenet1k", IMAGENET1K, name))
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise OSError(unreachable(weights.url, cache(), error)) from error


def imagenet21k(name: str) -> Path:
    """The file with the authors' weights of the model `name`; downloaded if not in the cache."""
    address = published("imagenet21k", IMAGENET21K, name)
    path = cache() / address.rpartition("/")[2]
    if not path.exists():
        download(address, path)
    return path


def published(weights: str, table: dict[str, str], name: str) -> str:
    """The table's entry for a model. Raises ValueError, which names those that have one."""
    if name not in table:
        raise ValueError(
            f"there are no {weights} weights for {name}; take one of {', '.join(table)}, "
            "or give --weights PATH or none"
        )
    return table[name]


def cache() -> Path:
    """Where torch keeps what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints"


# ------------------------------------------------------------------------------------- downloads


def unreachable(address: str, folder: Path, error: Exception) -> str:
    return (
        f"could not download {address} ({error}); where there is no network, fetch it elsewhere "
        f"and put it in {folder}"
    )


def download(address: str, path: Path) -> None:
    """Fetch a file over HTTP to `path`, where it is either whole and checked or not at all.

    It grows in a .part file beside, and what a broken connection leaves there is continued by the
    next call. Checked are the size that the server gives and, where it is Google's, the MD5 too.
    Raises OSError if the server cannot be reached, breaks off, or sends what fails the check.
    """
    part = path.with_name(path.name + ".part")
    # the last byte is asked for again: so the rest is never nothing, which servers refuse (416)
    start = max(part.stat().st_size - 1, 0) if part.exists() else 0
    removed = "what came is removed, and the same command starts over"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        headers = {"Range": f"bytes={start}-"} if start else {}
        request = urllib.request.Request(address, headers=headers)
        answer = urllib.request.urlopen(request, timeout=30)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:
            raise OSError(unreachable(address, path.parent, error)) from error
        part.unlink(missing_ok=True)
        raise OSError(f"{part} was longer than {address}; {removed}") from error

    broken = None
    with answer:
        size = answer.headers.get("Content-Length")
        if answer.status == 206:
            sent = answer.headers.get("Content-Range", "")
            if not re.fullmatch(rf"bytes {start}-\d+/\d+", sent):
                part.unlink()
                raise OSError(f"{address} sent another part than was asked for; {removed}")
            size = sent.rpartition("/")[2]
        else:  # all of it, whatever was asked for
            start = 0
        size = int(size) if size else None
        bar = tqdm(desc=path.name, initial=start, total=size, unit="B", unit_scale=True)
        try:
            with bar, part.open("r+b" if start else "wb") as file:
                file.seek(start)
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            broken = error
    got = part.stat().st_size if part.exists() else 0  # 0: it could not be made
    if broken or (size and got < size):
        raise OSError(
            f"the download of {address} broke off after {got} of {size or '?'} bytes "
            f"({broken or 'the connection was closed'}); the same command resumes it"
        ) from broken

    stated = re.search(r"md5=([\w+/=]+)", ",".join(answer.headers.get_all("x-goog-hash", [])))
    for what, came, right in (
        ("size", got, size or got),
        ("MD5", stated and md5(part), stated and stated[1]),
    ):
        if came != right:
            part.unlink()
            raise OSError(f"{address} came with {what} {came} instead of {right}; {removed}")
    part.replace(path)


def md5(path: Path) -> str:
    """A file's MD5 in base64, as Google's x-goog-hash header says it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()


# ---------------------------------------------------------------------------------- into a model


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
    if other keys or shapes differ, naming the first of them, or the number of classes alone.
    """
    own = model.state_dict()
    state = dict(state)
    if "position" in state and "position" in own and state["position"].ndim == 3:
        position, tokens = state["position"], own["position"].shape[1]
        square = math.isqrt(position.shape[1] - 1) ** 2 == position.shape[1] - 1
        if square and position.shape[1] != tokens and not head:
            state["position"] = resize_position(position, tokens)
    if not head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in own.items() if key.startswith("head.")}
    wrong = [
        key
        for key in [*own, *(key for key in state if key not in own)]
        if key not in state
        or key not in own
        or state[key].shape != own[key].shape
        or not (san.is_dense(state[key]) and state[key].is_floating_point())
    ]
    said = [
        f"{key} ({describe(state.get(key))} in the file, {describe(own.get(key))} in the model)"
        for key in wrong[:3]
    ]
    if {*wrong} == {"head.weight", "head.bias"} <= state.keys():
        raise ValueError(f"nothing but the number of classes differs: {said[0]}")
    if wrong:
        raise ValueError(
            f"these weights are of another architecture: {'; '.join(said)}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
    model.load_state_dict(state)


def require_head(state: dict[str, Tensor], outputs: int) -> None:
    """Raise ValueError if the head in a state dict in our names has another number of outputs."""
    if len(weight := state.get("head.weight", ())) != outputs:
        raise ValueError(f"its head has {len(weight)} outputs, not {outputs}")


def require(package: str, what: str) -> None:
    """Raise ValueError if `what` needs a package that is not installed."""
    if not importlib.util.find_spec(package):
        raise ValueError(
            f"{what} needs {package}, which is not installed; "
            "run pip install -r requirements-extra.txt"
        )


def in_one_line(error: Exception) -> str:
    """What an error says, for a message of one line; packages' own may have several."""
    return " ".join(str(error).split())


def describe(tensor: Tensor | None) -> str:
    """A tensor's shape in words, for messages: 96×96, or 'missing'."""
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"


def main() -> None:
    p = argparse.ArgumentParser(description="Write a run's model for timm or torchvision.")
    p.add_argument("weights", help="merged.pt or model.pt")
    p.add_argument("--layout", required=True, choices=TARGETS)
    p.add_argument("out")
    args = p.parse_args()
    try:
        san.write(to_layout(read_backbone(args.weights), args.layout), args.out)
    except (ValueError, OSError) as error:
        print(f"{p.prog}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    print(f"saved {args.out}, a state dict of {args.layout}'s model")


if __name__ == "__main__":
    main()
