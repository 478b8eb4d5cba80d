"""LLaVA checkpoints as others keep them: a folder of the Hugging Face layout, to a model of ours.

The tower must be a ViT such as ours. LLaVA-1.5's own is CLIP's, which has a norm before its blocks
and another activation: it is refused by name.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lab import llama, saved
from lab.checkpoints import for_our_pixels, rename, require
from models import LLaMA, LLaVA

# Hugging Face's names and ours, as in checkpoints.py; the LLaMA's are llama.py's
LAYER, BLOCK = "vision_tower.encoder.layer.{}.", "tower.blocks.{}."
NAMES = [
    ("multi_modal_projector.linear_", "projector.fc"),
    ("vision_tower.embeddings.cls_token", "tower.class_token"),
    ("vision_tower.embeddings.position_embeddings", "tower.position"),
    ("vision_tower.embeddings.patch_embeddings.projection", "tower.patch_embed"),
    *(
        (LAYER + theirs, BLOCK + ours)
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("attention.output.dense", "attn.proj"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
]
QKV = [LAYER + f"attention.attention.{name}." for name in ("query", "key", "value")]


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> LLaMA:
    """The LLaVA in such a folder; any other folder or file is left to `llama.load_llama`.

    Weights become `dtype`, norms stay wide. Raises OSError if a file is missing or broken,
    ValueError, which names what differs, for an architecture that is not ours.
    """
    path = Path(folder) / "config.json"
    config = llama.read_json(path) if path.is_file() else {}
    if config.get("model_type") != "llava":
        return llama.load_llama(folder, dtype)
    require("safetensors", "a folder with a LLaVA's weights")
    model = llama.without_weights(partial(numbers, config), path, LLaVA)
    llama.fill(model, weights(path.parent, len(model.tower.blocks)), dtype, path)
    if statistics := pixels(path.parent):
        layer = model.tower.patch_embed
        own = for_our_pixels(layer.weight.data, layer.bias.data, *statistics)
        layer.weight.data, layer.bias.data = own
    return model


def numbers(config: dict) -> dict:
    """LLaVA's arguments from a config.json. Raises ValueError, or KeyError for a missing entry."""
    vision, layer = config.get("vision_config", {}), config.get("vision_feature_layer", -2)
    if vision.get("model_type") != "vit":
        raise ValueError(
            f"its vision tower is of type '{vision.get('model_type', 'clip_vision_model')}'; only "
            "'vit' can be loaded"
        )
    vision = {"layer_norm_eps": 1e-12} | vision  # where it is left out, it is theirs
    for entries, key, value in (
        (vision, "hidden_act", "gelu"),
        (vision, "layer_norm_eps", 1e-6),
        (vision, "qkv_bias", True),
        (vision, "num_channels", 3),
        (vision, "intermediate_size", 4 * vision["hidden_size"]),
        (config, "vision_feature_select_strategy", "default"),
        (config, "projector_hidden_act", "gelu"),
        (config, "multimodal_projector_bias", True),
    ):
        if entries.get(key, value) != value:
            raise ValueError(f"{key} is {entries[key]}; only {value} can be loaded")
    depth = vision["num_hidden_layers"]
    if not isinstance(layer, int) or not -depth <= layer < 0:
        raise ValueError(f"vision_feature_layer is {layer}; only one of the last {depth} is read")
    tower = dict(
        image_size=vision["image_size"],
        patch=vision["patch_size"],
        dim=vision["hidden_size"],
        depth=depth + 1 + layer,  # −1 reads what the last block writes
        heads=vision["num_attention_heads"],
    )
    picture = config.get("image_token_index", config.get("image_token_id"))
    if picture is None:
        raise KeyError("image_token_index")
    return llama.llama_numbers(config["text_config"]) | dict(tower=tower, picture=picture)


def pixels(folder: Path) -> list[list[float]]:
    """Mean and deviation, by channel, of the pixels, 0 … 1, that the tower was trained on.

    Nothing where no processor's file has them: they are taken to be ours. Raises OSError.
    """
    three = {"image_mean": "three numbers", "image_std": "three numbers above 0"}
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        own = llama.read_json(path) if path.is_file() else {}
        own = own.get("image_processor", own)
        if isinstance(own, dict) and "image_mean" in own:
            with saved.naming(path):
                saved.require(own, three)
            return [own[name] for name in three]
    return []


def weights(folder: Path, depth: int) -> Iterator[tuple[str, str, Tensor]]:
    """(A file's name, our name, value) of what a tower of that depth and all after it has.

    q, k and v of the tower come as one layer; its later blocks, last norm and pooler not at all.
    """
    trios: dict[str, dict[int, Tensor]] = {}
    for key, value in llama.read_weights(folder):
        name = plain(key)
        if name.startswith(("vision_tower.layernorm.", "vision_tower.pooler.")):
            continue
        for part, theirs in enumerate(QKV):
            if (own := rename(name, [(theirs, BLOCK + "attn.qkv.")])) != name:
                name, trio = own, trios.setdefault(own, {})
                trio[part] = value
                value = torch.cat([trio[i] for i in range(3)]) if len(trio) == 3 else None
        name = rename(name, NAMES)
        later = name.startswith("tower.blocks.") and int(name.split(".")[2]) >= depth
        if value is not None and not later:
            yield key, rename(name, llama.NAMES), value


def plain(key: str) -> str:
    """A weight's name without the prefixes in which older and newer files differ."""
    if key.startswith("model.language_model."):
        return "model." + key.removeprefix("model.language_model.")
    if key.startswith("language_model."):
        return key.removeprefix("language_model.")
    return key.removeprefix("model.")
