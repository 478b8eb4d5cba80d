"""Weights from files: published ones in their layouts, brought under our names, and our own.

`backbone_state` gives what --weights names, from a file or from the cache of downloads, and
`load_backbone` puts it into a model of models.py; `load_llama` reads a folder of the Hugging Face
layout. Whose a layout is decides its names alone: the architectures are the same.
"""

import argparse
import base64
import hashlib
import http.client
import json
import math
import re
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
from models import LLaMA

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

# other people's names → ours, tried in this order on the start of every key; first torchvision's,
# where ConvNeXt's and Swin's numbers stay as they are, and are halved in a second step
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
SWIN_NAMES = [
    (r"features\.0\.0", "patch_embed"),
    (r"features\.0\.2", "patch_norm"),
    (
        r"features\.([1357])\.(\d+)\.attn\.relative_position_bias_table",
        r"stages.\1.\2.attn.offset_bias",
    ),
    (r"features\.([1357])\.(\d+)\.mlp\.0", r"stages.\1.\2.mlp.fc1"),
    (r"features\.([1357])\.(\d+)\.mlp\.3", r"stages.\1.\2.mlp.fc2"),
    (r"features\.([1357])\.", r"stages.\1."),
    (r"features\.([246])\.", r"downsample.\1."),
]
# the authors' own
VIT_AUTHORS = [
    (r"cls", "class_token"),
    (r"embedding", "patch_embed"),
    (r"Transformer/posembed_input/pos_embedding", "position"),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_0", r"blocks.\1.norm1"),
    (
        r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_1/out",
        r"blocks.\1.attn.proj",
    ),
    (r"Transformer/encoderblock_(\d+)/MultiHeadDotProductAttention_1/", r"blocks.\1.attn."),
    (r"Transformer/encoderblock_(\d+)/LayerNorm_2", r"blocks.\1.norm2"),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_3/Dense_0", r"blocks.\1.mlp.fc1"),
    (r"Transformer/encoderblock_(\d+)/MlpBlock_3/Dense_1", r"blocks.\1.mlp.fc2"),
    (r"Transformer/encoder_norm", "norm"),
]
CONVNEXT_AUTHORS = [
    (r"downsample_layers\.0\.", "stem."),
    *((rf"downsample_layers\.{i + 1}\.", f"downsample.{i}.") for i in range(3)),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.\2.layer_scale"),
]
SWIN_AUTHORS = [
    (r"patch_embed\.proj", "patch_embed"),
    (r"patch_embed\.norm", "patch_norm"),
    (
        r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table",
        r"stages.\1.\2.attn.offset_bias",
    ),
    (r"layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"layers\.(\d+)\.downsample\.", r"downsample.\1."),
]
# timm's, of all three: its Swin has its authors' names, but for the mergings and the head
TIMM_NAMES = [
    (r"cls_token", "class_token"),
    (r"pos_embed", "position"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw", r"stages.\1.\2.dwconv"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc", r"stages.\1.\2.pwconv"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.layer_scale"),
    (r"stages\.(\d+)\.blocks\.", r"stages.\1."),
    *((rf"(?:stages|layers)\.{i + 1}\.downsample\.", f"downsample.{i}.") for i in range(3)),
    (r"head\.norm", "norm"),
    (r"head\.fc", "head"),
    *SWIN_AUTHORS,
]
# Hugging Face's
LLAMA_NAMES = [
    (r"model\.embed_tokens", "embed"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"blocks.\1.norm1"),
    (r"model\.layers\.(\d+)\.self_attn", r"blocks.\1.attn"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blocks.\1.norm2"),
    (r"model\.layers\.(\d+)\.mlp", r"blocks.\1.mlp"),
    (r"model\.norm", "norm"),
    (r"lm_head", "head"),
]


def rename(key: str, names: list[tuple[str, str]]) -> str:
    """`key` with its start replaced by the first of the patterns that matches it, if any does."""
    for pattern, ours in names:
        new, found = re.subn("^" + pattern, ours, key)
        if found:
            return new
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
    """A state dict of torchvision's ViT, ConvNeXt or Swin under our names and shapes.

    torchvision numbers the stages of the latter two and the halvings between them in one row:
    1, 3, 5, 7 are stages 0 to 3, and 2, 4, 6 are halvings 0 to 2.
    """
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
        if names is not VIT_NAMES:
            key = re.sub(r"^stages\.(\d)", lambda m: f"stages.{int(m[1]) // 2}", key)
            key = re.sub(r"^downsample\.(\d)", lambda m: f"downsample.{int(m[1]) // 2 - 1}", key)
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
    return distinct((rename(key, TIMM_NAMES), value) for key, value in state.items())


def from_vit_authors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of a ViT as its authors published it, in JAX, under our names and shapes.

    Their kernels have the outputs last, and attention's are split into h heads of d channels:
    query, key and value are C×h×d, out is h×d×C. Left out is the head, with the layer before it
    that only pre-training had. Their pixels are (x − 0.5) / 0.5, ours (x − mean) / std; the patch
    embedding W, b takes the difference in, exactly since it pads nothing [us]:

        W' = W ⊙ std / 0.5,    b' = b + Σ W (mean − 0.5) / 0.5

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
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    shift = (weight * (mean - 0.5) / 0.5).sum((1, 2, 3))
    state["patch_embed.weight"] = weight * std / 0.5
    state["patch_embed.bias"] = state["patch_embed.bias"] + shift
    return state


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


# ----------------------------------------------------------------------------------------- LLaMA


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}; give a complete model folder") from error
    except ValueError as error:  # what is no JSON, and what is no text
        raise OSError(f"{path} is broken: it is no JSON; fetch it again") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is broken: it holds no JSON object; fetch it again")
    return content


def llama_numbers(config: dict) -> dict:
    """LLaMA's arguments from a Hugging Face config.json of whichever age.

    Raises ValueError for what this LLaMA does not have, KeyError if an entry is missing.
    """
    kind = config["model_type"]
    if kind != "llama":
        raise ValueError(f"this is a model of type '{kind}'; only 'llama' can be loaded")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key} is set; only LLaMA models without biases can be loaded")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is '{config['hidden_act']}'; only 'silu' can be loaded")
    # newer files hold both the base and the scaling in rope_parameters
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return dict(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        head_dim=config.get("head_dim"),
        eps=config["rms_norm_eps"],
        rope_base=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scaling=rope if scaled else None,
    )


def load_llama(folder: Path, dtype: torch.dtype = torch.float32) -> LLaMA:
    """The LLaMA in a folder of the Hugging Face layout: config.json and safetensors files.

    Weights become `dtype`, one tensor at a time, so that the model is never in memory twice; the
    norms' stay in float32 at least. Raises OSError if a file is missing or broken, ValueError if
    the model is of another architecture, naming what differs, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(
            "LLaMA's weights need safetensors, which is not installed; "
            "run pip install -r requirements-extra.txt"
        ) from error
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give one that holds a LLaMA model")
    config = read_json(folder / "config.json")
    try:
        numbers = llama_numbers(config)
        with torch.device("meta"):  # names and shapes, no memory
            model = LLaMA(**numbers)
    except KeyError as error:
        raise OSError(f"{folder / 'config.json'} has no entry {error}; fetch it again") from error
    except (AttributeError, ValueError, TypeError) as error:  # a text where a number belongs
        raise ValueError(f"{folder / 'config.json'}: {error}") from error

    own = dict(model.named_parameters())  # without the head where it is tied
    missing = dict.fromkeys(own)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    name = rename(key, LLAMA_NAMES)
                    if "rotary_emb.inv_freq" in key or (name == "head.weight" and numbers["tied"]):
                        continue
                    value = file.get_tensor(key)
                    if name not in missing or value.shape != own[name].shape:
                        raise ValueError(
                            f"these weights are not of the model in config.json: {key} "
                            f"({describe(value)} in {path.name}, {describe(own.get(name))} "
                            f"in the model)"
                        )
                    wide = torch.promote_types(dtype, torch.float32)
                    # a copy always: what get_tensor gives is the file itself, mapped into memory
                    value = value.to(wide if "norm" in name else dtype, copy=True)
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, nn.Parameter(value))
                    del missing[name]
        except SafetensorError as error:
            raise OSError(f"{path} is broken ({error}); fetch it again") from error
    if missing:
        raise ValueError(
            f"these weights are not of the model in config.json: {', '.join([*missing][:3])} "
            f"missing in {folder}"
        )
    if numbers["tied"]:
        model.head.weight = model.embed.weight
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises OSError if one is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise FileNotFoundError(
            f"there is no {whole.name} in {folder}; fetch the model in the safetensors format"
        )
    try:
        shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise OSError(f"{index} is broken: it names no files; fetch it again") from error
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"there is no file {shard}, which {index.name} names; fetch it")
    return shards
