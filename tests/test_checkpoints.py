"""checkpoints.py: published files convert exactly, broken ones are refused, downloads resume."""

import argparse
import base64
import copy
import hashlib
import pickle
import re
import socket
import struct
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import (
    TINY_VIT,
    difference,
    published_convnext,
    published_swin,
    published_vit,
    random_images,
    randomise,
    tiny_convnext,
    tiny_swin,
    tiny_vit,
    torchvisions_tiny_convnext,
    torchvisions_tiny_swin,
    torchvisions_tiny_vit,
)
from torch import Tensor, nn

from lab import batches, checkpoints
from models import Swin, ViT

pytestmark = pytest.mark.usefixtures("one_thread")


def publish(model: nn.Module, folder: Path) -> Path:
    """The model's weights in a file as its authors would publish it."""
    if isinstance(model, ViT):
        path = folder / "ViT.npz"
        np.savez(path, **published_vit(model))
        return path
    path, convnext = folder / "22k.pth", hasattr(model, "stem")
    torch.save(published_convnext(model) if convnext else published_swin(model), path)
    return path


# ------------------------------------------------------------------------- the authors' layouts


VIT_BLOCK = {
    *("LayerNorm_0/scale", "LayerNorm_0/bias", "LayerNorm_2/scale", "LayerNorm_2/bias"),
    *("MlpBlock_3/Dense_0/kernel", "MlpBlock_3/Dense_0/bias"),
    *("MlpBlock_3/Dense_1/kernel", "MlpBlock_3/Dense_1/bias"),
    *(
        f"MultiHeadDotProductAttention_1/{part}/{kind}"
        for part in ("query", "key", "value", "out")
        for kind in ("kernel", "bias")
    ),
}


def test_the_vit_that_these_tests_publish_has_the_names_and_shapes_of_the_real_file():
    arrays = published_vit(tiny_vit(depth=1))
    assert arrays.keys() == {
        *("cls", "embedding/kernel", "embedding/bias", "Transformer/posembed_input/pos_embedding"),
        *("Transformer/encoder_norm/scale", "Transformer/encoder_norm/bias"),
        *("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"),
        *(f"Transformer/encoderblock_0/{key}" for key in VIT_BLOCK),
    }
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    shapes = {key: array.shape for key, array in arrays.items()}
    assert shapes["embedding/kernel"] == (8, 8, 3, 8)
    assert shapes[f"{attention}/key/kernel"] == (8, 2, 4)
    assert shapes[f"{attention}/key/bias"] == (2, 4)
    assert shapes[f"{attention}/out/kernel"] == (2, 4, 8)
    assert shapes["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"] == (8, 32)


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext, tiny_swin])
def test_every_tensor_comes_back_from_the_authors_layout(build, tmp_path):
    model = build()
    state = checkpoints.read_backbone(publish(model, tmp_path))
    heads = {"head.weight", "head.bias"} if isinstance(model, ViT) else set()
    assert state.keys() == model.state_dict().keys() - heads
    for key, value in state.items():
        if isinstance(model, ViT) and key.startswith("patch_embed"):
            torch.testing.assert_close(value, model.state_dict()[key], atol=1e-6, rtol=0)
        else:
            assert torch.equal(value, model.state_dict()[key]), key


@torch.no_grad()
@pytest.mark.parametrize(
    "theirs, ours",
    [(torchvisions_tiny_convnext, tiny_convnext), (torchvisions_tiny_swin, tiny_swin)],
)
def test_a_file_of_the_authors_gives_the_logits_of_torchvisions_model(theirs, ours, tmp_path):
    # torchvision's names to the authors', by way of none of ours
    swin, state = theirs is torchvisions_tiny_swin, {}
    for key, value in theirs().state_dict().items():
        parts = key.split(".")
        stage = int(parts[1]) if parts[0] == "features" else None
        if stage == 0 and swin:
            parts = ["patch_embed", {"0": "proj", "2": "norm"}[parts[2]], *parts[3:]]
        elif stage is not None and stage % 2 == 0:
            parts = (
                ["layers", str(stage // 2 - 1), "downsample", *parts[2:]]
                if swin
                else ["downsample_layers", str(stage // 2), *parts[2:]]
            )
        elif swin and stage:
            parts = ["layers", str(stage // 2), "blocks", *parts[2:]]
            if parts[4] == "mlp":
                parts[5] = {"0": "fc1", "3": "fc2"}[parts[5]]
        elif stage and parts[3] == "layer_scale":
            parts, value = ["stages", str(stage // 2), parts[2], "gamma"], value.flatten()
        elif stage:
            name = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}[parts[4]]
            parts = ["stages", str(stage // 2), parts[2], name, *parts[5:]]
        elif parts[0] == "classifier":
            parts[:2] = [{"0": "norm", "2": "head"}[parts[1]]]
        state[".".join(parts)] = value
    torch.save({"model": state}, tmp_path / "22k.pth")
    assert state.keys() == {
        key
        for key in (published_swin if swin else published_convnext)(ours())["model"]
        if not key.endswith("attn_mask")  # of the authors alone
    }
    own = ours()
    checkpoints.load_backbone(own, checkpoints.read_backbone(tmp_path / "22k.pth"), head=True)
    images = random_images(32)
    assert theirs()(images).std() > 0.1
    assert difference(theirs(), own, images) < 1e-5


def jax_vit(arrays: dict[str, np.ndarray], pixels: Tensor) -> Tensor:
    """The class token that the authors' ViT ends with, from its arrays as they are, in float64.

    pixels: B×H×W×3, 0 … 1. Layers as flax defines them, but for GELU, which is exact here.
    """
    w = {key: torch.from_numpy(array).double() for key, array in arrays.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}/scale"] + w[f"{name}/bias"]

    def dense(name: str, formula: str, x: Tensor) -> Tensor:
        return torch.einsum(formula, x, w[f"{name}/kernel"]) + w[f"{name}/bias"]

    p = len(w["embedding/kernel"])
    x = (pixels.double() - 0.5) / 0.5
    x = x.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # B rows p columns p 3
    x = dense("embedding", "bypxqi,pqic->byxc", x).flatten(1, 2)
    x = torch.cat([w["cls"].expand(len(x), -1, -1), x], dim=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(sum(key.endswith("out/kernel") for key in w)):
        root = f"Transformer/encoderblock_{i}"
        attention = f"{root}/MultiHeadDotProductAttention_1"
        y = norm(f"{root}/LayerNorm_0", x)
        q, k, v = (
            dense(f"{attention}/{name}", "bnc,chd->bnhd", y) for name in ("query", "key", "value")
        )
        looks = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        y = torch.einsum("bhnm,bmhd->bnhd", looks.softmax(-1), v)
        x = x + dense(f"{attention}/out", "bnhd,hdc->bnc", y)
        y = dense(f"{root}/MlpBlock_3/Dense_0", "bnc,ce->bne", norm(f"{root}/LayerNorm_2", x))
        x = x + dense(f"{root}/MlpBlock_3/Dense_1", "bne,ec->bnc", F.gelu(y))
    return norm("Transformer/encoder_norm", x)[:, 0]


def random_arrays() -> dict[str, np.ndarray]:
    """Arrays of the published names and shapes, whose values owe nothing to our model."""
    generator = np.random.default_rng(0)
    return {
        key: generator.normal(1.0 if key.endswith("scale") else 0.0, 0.3, size=array.shape).astype(
            "float32"
        )
        for key, array in published_vit(tiny_vit()).items()
    }


@torch.no_grad()
def test_the_published_vit_reads_bytes_as_its_authors_code_does():
    arrays, own = random_arrays(), tiny_vit()
    checkpoints.load_backbone(own, checkpoints.from_vit_authors(arrays))
    pixels = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    expected = jax_vit(arrays, pixels.permute(0, 2, 3, 1) / 255)
    assert expected.std() > 0.3
    features = own.features(batches.to_input(pixels.byte()))
    torch.testing.assert_close(features.double(), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_pixels_normalised_each_way_give_equal_patch_embeddings():
    arrays = random_arrays()
    state = checkpoints.from_vit_authors(arrays)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kernel = torch.from_numpy(arrays["embedding/kernel"]).permute(3, 2, 0, 1)
    theirs = F.conv2d((pixels - 0.5) / 0.5, kernel, torch.from_numpy(arrays["embedding/bias"]), 8)
    mean, std = (torch.tensor(n).view(3, 1, 1) for n in (checkpoints.MEAN, checkpoints.STD))
    weight, bias = state["patch_embed.weight"], state["patch_embed.bias"]
    ours = F.conv2d((pixels - mean) / std, weight, bias, 8)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (F.conv2d((pixels - mean) / std, kernel, bias, 8) - theirs).abs().mean() > 0.1


def test_converting_leaves_the_arrays_it_is_given_as_they_were():
    arrays = random_arrays()
    before = copy.deepcopy(arrays)
    checkpoints.from_vit_authors(arrays)
    assert all(np.array_equal(before[key], array) for key, array in arrays.items())


# --------------------------------------------------------------------------------- timm's layout

# timm's ConvNeXt has four stages, and its Swin pads a grid otherwise where windows do not fill it
VIT = tiny_vit()
CONVNEXT = tiny_convnext(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16))
SWIN = tiny_swin(patch=2, window=4, depths=(2, 2, 2), heads=(2, 4, 4))
EACH_OF_TIMMS_SIZES = pytest.mark.parametrize("ours", [VIT, CONVNEXT, SWIN])


def timms(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under timm's names."""
    vit, swin = isinstance(model, ViT), isinstance(model, Swin)
    stages = "layers" if swin else "stages"
    names = {
        r"^class_token": "cls_token",
        r"^position": "pos_embed",
        r"^patch_embed": "patch_embed.proj",
        r"^patch_norm": "patch_embed.norm",
        r"^stages\.(\d+)\.": rf"{stages}.\1.blocks.",
        r"^downsample\.(\d+)": lambda m: f"{stages}.{int(m[1]) + 1}.downsample",
        r"dwconv": "conv_dw",
        r"pwconv": "mlp.fc",
        r"layer_scale": "gamma",
        r"offset_bias": "relative_position_bias_table",
        r"^head": "head" if vit else "head.fc",
        r"^norm": "norm" if vit or swin else "head.norm",
    }
    state = {}
    for key, value in model.state_dict().items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


def timms_tiny(ours: nn.Module, **changes) -> nn.Module:
    """timm's own model of the size of one of those, its weights owing nothing to ours."""
    timm = pytest.importorskip("timm", reason="the reference is timm's model; pip install timm")
    if isinstance(ours, ViT):
        numbers = dict(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2)
        build = timm.models.vision_transformer.VisionTransformer
    elif isinstance(ours, Swin):
        numbers = dict(img_size=32, patch_size=2, window_size=4, embed_dim=8)
        numbers |= dict(depths=(2, 2, 2), num_heads=(2, 4, 4))
        build = timm.models.swin_transformer.SwinTransformer
    else:
        numbers = dict(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16))
        build = timm.models.convnext.ConvNeXt
    return randomise(build(**{**numbers, "num_classes": 5, **changes}), seed=1)


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@EACH_OF_TIMMS_SIZES
def test_what_these_tests_name_as_timm_does_has_the_names_and_shapes_of_timms_model(ours):
    assert shapes(timms(ours)) == shapes(timms_tiny(ours).state_dict())


@EACH_OF_TIMMS_SIZES
def test_every_tensor_comes_back_from_timms_layout(ours, tmp_path):
    torch.save(timms(ours), tmp_path / "timm.pth")
    state = checkpoints.read_backbone(tmp_path / "timm.pth")
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in ours.state_dict().items())


@torch.no_grad()
@EACH_OF_TIMMS_SIZES
def test_a_file_of_timm_gives_the_features_and_logits_of_timms_model(ours, tmp_path):
    theirs, ours, images = timms_tiny(ours), copy.deepcopy(ours), random_images(32)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    checkpoints.load_backbone(ours, checkpoints.read_backbone(tmp_path / "timm.pth"), head=True)
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    assert features.std() > 0.1 and theirs(images).std() > 0.1
    torch.testing.assert_close(ours.features(images), features, atol=1e-5, rtol=0)
    assert difference(theirs, ours, images) < 1e-5


def torchvisions(ours: nn.Module) -> nn.Module:
    """torchvision's own model of the size of one of those."""
    if isinstance(ours, ViT):
        return torchvisions_tiny_vit()
    return torchvisions_tiny_swin() if isinstance(ours, Swin) else torchvisions_tiny_convnext()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["timm", "torchvision"])
@pytest.mark.parametrize("kind", ["vit", "convnext", "swin"])
def test_a_runs_model_is_written_for_others_who_compute_the_same(
    kind, layout, tmp_path, monkeypatch, capsys
):
    if layout == "timm":
        ours = {"vit": VIT, "convnext": CONVNEXT, "swin": SWIN}[kind]
    else:
        ours = {"vit": tiny_vit, "convnext": tiny_convnext, "swin": tiny_swin}[kind]()
    theirs = copy.deepcopy(timms_tiny(ours) if layout == "timm" else torchvisions(ours))
    run = {"model": kind, "factors": [5], "state_dict": ours.state_dict()}
    torch.save(run, tmp_path / "merged.pt")
    words = [tmp_path / "merged.pt", "--layout", layout, tmp_path / "out.pt"]
    monkeypatch.setattr("sys.argv", ["checkpoints", *map(str, words)])
    checkpoints.main()
    assert f"out.pt, a state dict of {layout}'s model" in capsys.readouterr().out
    theirs.load_state_dict(torch.load(tmp_path / "out.pt"))  # every name is there
    images = random_images(32)
    assert difference(theirs, ours, images) < 1e-5 < theirs(images).std()
    assert same(checkpoints.read_backbone(tmp_path / "out.pt"), ours.state_dict())


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 1, "there is no file"),
        ({"embed.weight": torch.zeros(3, 2)}, 2, "holds no ViT, ConvNeXt or Swin"),
        ({"class_token": torch.zeros(1), "blocks.0.prompts": torch.zeros(2)}, 2, "prompts of vpt"),
    ],
)
def test_what_others_have_no_place_for_is_refused(
    content, code, words, tmp_path, monkeypatch, capsys
):
    if content:
        torch.save(content, tmp_path / "merged.pt")
    names = [str(tmp_path / "merged.pt"), "--layout", "timm", str(tmp_path / "out.pt")]
    monkeypatch.setattr("sys.argv", ["checkpoints", *names])
    with pytest.raises(SystemExit, match=str(code)):
        checkpoints.main()
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out.pt").exists()


def test_where_a_swins_mergings_stand_tells_timms_layout_from_its_authors(tmp_path):
    merging = "layers.1.downsample.reduction.weight"
    authors, timm = published_swin(SWIN)["model"], timms(SWIN)
    assert authors[merging].shape != timm[merging].shape
    for state in (authors, timm):
        torch.save(state, tmp_path / "swin.pth")
        read = checkpoints.read_backbone(tmp_path / "swin.pth")
        assert all(torch.equal(read[key], value) for key, value in SWIN.state_dict().items())


@pytest.mark.parametrize(
    "ours, changes, named",
    [
        (VIT, dict(qk_norm=True), r"blocks\.0\.attn\.q_norm\.weight .*missing in the model"),
        (VIT, dict(init_values=1.0), r"blocks\.0\.ls1\.gamma .*missing in the model"),
        (VIT, dict(reg_tokens=2), "position .*1×19×8 in the file.* reg_token"),
        (VIT, dict(no_embed_class=True), "position .*1×16×8 in the file"),
        (VIT, dict(class_token=False, global_pool="avg"), r"class_token \(missing in the file"),
        (VIT, dict(global_pool="avg"), r"norm\.weight \(missing in the file.* fc_norm"),
        (VIT, dict(pre_norm=True), r"patch_embed\.bias \(missing in the file.* norm_pre"),
        (VIT, dict(qkv_bias=False), r"blocks\.0\.attn\.qkv\.bias \(missing in the file"),
        (CONVNEXT, dict(conv_mlp=True), r"pwconv1\.weight \(16×4×1×1 in the file"),
        (CONVNEXT, dict(use_grn=True), r"\.mlp\.grn\.\S+ .*missing in the model"),
        (CONVNEXT, dict(ls_init_value=None), r"layer_scale \(missing in the file"),
        (CONVNEXT, dict(head_norm_first=True), r"norm\.weight \(missing in the file.* norm_pre"),
        (SWIN, dict(window_size=2), r"offset_bias \(9×2 in the file"),
    ],
)
def test_a_model_of_timm_that_is_built_otherwise_is_refused_by_key(ours, changes, named, tmp_path):
    torch.save(timms_tiny(ours, **changes).state_dict(), tmp_path / "timm.pth")
    state = checkpoints.read_backbone(tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=f"another architecture: .*{named}"):
        checkpoints.load_backbone(copy.deepcopy(ours), state)


def test_weights_that_differ_in_nothing_but_their_classes_are_said_to():
    state, other = tiny_vit(48).state_dict(), tiny_vit(20)
    words = r"^nothing but the number of classes differs: head.weight \(48×8 in the file, 20×8 in"
    with pytest.raises(ValueError, match=words):
        checkpoints.load_backbone(other, state, head=True)
    checkpoints.load_backbone(other, state)  # the head stays as it was
    del state["head.weight"], state["head.bias"]
    with pytest.raises(ValueError, match="another architecture: head.weight .missing in the file"):
        checkpoints.load_backbone(other, state, head=True)


def test_a_second_swin_is_refused_by_key(tmp_path):
    timm = pytest.importorskip("timm", reason="it builds a SwinV2; pip install timm")
    second = timm.models.swin_transformer_v2.SwinTransformerV2(
        *(32, 2, 3, 5), embed_dim=8, depths=(2, 2, 2), num_heads=(2, 4, 4), window_size=4
    )
    torch.save(second.state_dict(), tmp_path / "timm.pth")
    state = checkpoints.read_backbone(tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"downsample\.0\.norm\.weight \(16 in the file"):
        checkpoints.load_backbone(copy.deepcopy(SWIN), state)


@EACH_OF_TIMMS_SIZES
def test_a_headless_file_of_timm_loads_but_for_the_head(ours, tmp_path):
    theirs, ours = timms_tiny(ours, num_classes=0), copy.deepcopy(ours)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    state = checkpoints.read_backbone(tmp_path / "timm.pth")
    checkpoints.load_backbone(ours, state)
    with pytest.raises(ValueError, match=r"head\.weight \(missing in the file"):
        checkpoints.load_backbone(ours, state, head=True)


# ----------------------------------------------------------------------- files as trainers leave

BUILDS = [tiny_vit, tiny_convnext, tiny_swin]


def read_back(content: object, folder: Path) -> dict[str, Tensor]:
    """What read_backbone makes of a torch file with that content."""
    torch.save(content, folder / "model.pt")
    return checkpoints.read_backbone(folder / "model.pt")


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


class Task(nn.Module):
    """A model as an attribute of what trains it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net = model


def compile_a_block(model: nn.Module) -> nn.Module:
    blocks = model.blocks if isinstance(model, ViT) else model.stages[0]
    blocks[0] = torch.compile(blocks[0])
    return model


def compile_all_and_a_block(model: nn.Module) -> nn.Module:
    return torch.compile(compile_a_block(model))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,  # names as DistributedDataParallel does
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
        compile_a_block,
        compile_all_and_a_block,
        Task,
        lambda model: Task(torch.compile(nn.DataParallel(model))),
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.optim.swa_utils.AveragedModel(nn.DataParallel(model)),
    ],
)
def test_a_model_that_was_wrapped_loads(build, wrap, tmp_path):
    expected = build().state_dict()
    wrapped = wrap(build()).state_dict()
    assert wrapped.keys() != expected.keys()
    assert same(read_back(wrapped, tmp_path), expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "net.", "vit.encoder."]
)
@pytest.mark.parametrize(
    "published",
    [
        *(lambda model=model: timms(model) for model in (VIT, CONVNEXT, SWIN)),
        lambda: torchvisions_tiny_vit().state_dict(),
        lambda: torchvisions_tiny_swin().state_dict(),
        lambda: published_convnext(tiny_convnext())["model"],
        lambda: published_swin(tiny_swin())["model"],
    ],
)
def test_a_wrapped_model_of_any_layout_reads_as_it_does_unwrapped(published, prefix, tmp_path):
    plain = read_back(published(), tmp_path)
    assert same(read_back({"state_dict": behind(prefix, published())}, tmp_path), plain)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"state_dict": behind("model.", state), "epoch": 3, "hyper_parameters": {}},
        lambda state: {"model": state, "optimizer": {"state": {0: {}}, "param_groups": [{}]}},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.5},
        lambda state: {"net": behind("module.", state), "acc": 0.5},
        lambda state: {"module": state, "lr_scheduler": None},
        lambda state: {"state_dict": None, "state_dict_ema": state},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(3), **behind("module.", state)}},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, betas=[0.9, 0.99])},
    ],
)
def test_weights_are_found_among_what_a_trainer_keeps(content, tmp_path):
    expected = tiny_vit().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read_back(content(expected), tmp_path), expected)


@pytest.mark.parametrize(
    "trained, averaged", [("state_dict", "state_dict_ema"), ("model", "model_ema")]
)
def test_of_weights_and_their_average_those_trained_are_read_with_a_warning(
    trained, averaged, tmp_path
):
    expected = tiny_vit().state_dict()
    average = {key: value + 1 for key, value in expected.items()}
    with pytest.warns(UserWarning, match=f"model.pt holds {trained} and {averaged}: {trained} is"):
        state = read_back({averaged: average, trained: expected}, tmp_path)
    assert same(state, expected)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "prefixes, beside, named",
    [
        (["model."], "criterion.weight", r"model\.\S+ and criterion\.weight,"),
        (["net."], "metric.confusion", r"net\.\S+ and metric\.confusion,"),
        (["vit."], "mean", r"vit\.\S+ and mean,"),
        (["module.model."], "module.loss.weight", r"module\.model\.\S+ and module\.loss\.weight,"),
        (["model.", "ema.module."], "ema.n_averaged", r"ema\.module\.\S+ and model\.\S+,"),
        (["student.", "teacher."], "n_averaged", r"student\.\S+ and teacher\.\S+,"),
        (["", "module."], "n_averaged", r"module\.\S+ and [^.]\S+,"),
    ],
)
def test_entries_beside_a_wrapped_models_are_refused_by_name(
    build, prefixes, beside, named, tmp_path
):
    state = {beside: torch.ones(5)}
    for prefix in prefixes:
        state |= behind(prefix, build().state_dict())
    with pytest.raises(ValueError, match=f"model.pt holds {named} .* save the .* alone") as caught:
        read_back(state, tmp_path)
    assert "\n" not in str(caught.value)


def test_entries_beside_a_plain_models_are_refused_by_name(tmp_path):
    for beside in ("criterion.weight", "module.head.weight", "decoder_patch_embed.weight"):
        state = read_back(tiny_vit().state_dict() | {beside: torch.ones(5)}, tmp_path)
        with pytest.raises(ValueError, match=f"{beside} .*missing in the model"):
            checkpoints.load_backbone(tiny_vit(), state)


@pytest.mark.parametrize("missing", ["class_token", "patch_embed.bias", "blocks.1.mlp.fc2.bias"])
def test_what_is_missing_behind_a_wrapper_is_named(missing, tmp_path):
    state = tiny_vit().state_dict()
    del state[missing]
    state = read_back(behind("module._orig_mod.", state), tmp_path)
    with pytest.raises(ValueError, match=rf"architecture: {missing} \(missing in the file[^;]*$"):
        checkpoints.load_backbone(tiny_vit(), state)


def test_of_a_file_with_one_entry_all_that_is_missing_is_named(tmp_path):
    state = read_back({"module.patch_embed.weight": tiny_vit().patch_embed.weight}, tmp_path)
    assert state.keys() == {"patch_embed.weight"}
    with pytest.raises(ValueError, match=r"architecture: class_token \(missing in the file"):
        checkpoints.load_backbone(tiny_vit(), state)


@pytest.mark.parametrize(
    "twice, named",
    [
        ("blocks.0._orig_mod.norm1.weight", "blocks.0.norm1.weight"),
        ("_orig_mod.position", "position"),
        ("class_token", "class_token"),  # beside timm's cls_token
    ],
)
def test_two_entries_by_one_name_are_refused(twice, named, tmp_path):
    state = timms(tiny_vit()) if twice == named else tiny_vit().state_dict()
    with pytest.raises(ValueError, match=f"model.pt holds two entries for {named};"):
        read_back(state | {twice: torch.ones(8)}, tmp_path)


# ----------------------------------------------------------------------------- into a model


def test_positions_of_the_same_image_size_load_unchanged():
    source, model = tiny_vit(), ViT(5, **TINY_VIT)
    checkpoints.load_backbone(model, source.state_dict())
    assert torch.equal(model.position, source.position)


def test_positions_of_another_image_size_are_interpolated_and_the_class_token_is_kept():
    source, model = tiny_vit(), ViT(5, **{**TINY_VIT, "image_size": 64})
    rows = torch.arange(4.0).repeat_interleave(4)  # a 4×4 grid whose values tell their row
    source.position.data[:, 1:] = rows[None, :, None]
    checkpoints.load_backbone(model, source.state_dict())
    assert torch.equal(model.position[:, 0], source.position[:, 0])
    grid = model.position.detach()[0, 1:, 0].view(8, 8)
    assert torch.allclose(grid, grid[:, :1].expand(8, 8))  # constant along a row still
    assert (grid[:, 0].diff() > 0).all()  # and growing from row to row
    assert grid.mean() == pytest.approx(1.5)


def rename_a_layer(state):
    state["blocks.0.attn.qkv2.weight"] = state.pop("blocks.0.attn.qkv.weight")


def widen_a_layer(state):
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(33)


def add_a_block(state):
    state["blocks.2.norm1.weight"] = torch.ones(8)


def widen_the_positions(state):
    state["position"] = torch.zeros(1, 17, 9)


def make_the_position_grid_oblong(state):
    state["position"] = torch.zeros(1, 1 + 3 * 4, 8)


@pytest.mark.parametrize(
    "change, named",
    [
        (rename_a_layer, r"blocks\.0\.attn\.qkv\.weight"),
        (widen_a_layer, r"blocks\.1\.mlp\.fc1\.bias .*33.*32"),
        (add_a_block, r"blocks\.2\.norm1\.weight"),
        (widen_the_positions, r"position .*9"),
        (make_the_position_grid_oblong, "position"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_key_and_change_nothing(change, named):
    model, state = tiny_vit(), ViT(5, **TINY_VIT).state_dict()
    before = copy.deepcopy(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=named):
        checkpoints.load_backbone(model, state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_the_other_kind_of_backbone_are_refused():
    with pytest.raises(ValueError, match="patch_embed|class_token|position"):
        checkpoints.load_backbone(tiny_vit(), tiny_convnext().state_dict())
    with pytest.raises(ValueError, match="stem"):
        checkpoints.load_backbone(tiny_convnext(), tiny_vit().state_dict())


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext, tiny_swin])
@pytest.mark.parametrize("files_head", ["another size", "the same size", "none"])
def test_the_head_is_left_as_it_was_and_the_rest_is_loaded(build, files_head):
    state = build(outputs=5 if files_head == "the same size" else 9).state_dict()
    if files_head == "none":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    model = build(outputs=5)
    for parameter in model.parameters():
        parameter.data += 1
    head = copy.deepcopy(model.head.state_dict())
    checkpoints.load_backbone(model, state)
    for key, value in model.state_dict().items():
        expected = head[key[5:]] if key.startswith("head.") else state[key]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext, tiny_swin])
def test_the_head_is_loaded_where_it_is_asked_for(build):
    source, model = build(), build()
    model.head.weight.data.zero_()
    checkpoints.load_backbone(model, source.state_dict(), head=True)
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_head_of_another_size_is_refused_where_it_is_asked_for():
    with pytest.raises(ValueError, match="head.weight .*9.*5"):
        checkpoints.load_backbone(tiny_vit(), tiny_vit(outputs=9).state_dict(), head=True)


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (torchvisions_tiny_vit, tiny_vit),
        (torchvisions_tiny_convnext, tiny_convnext),
        (torchvisions_tiny_swin, tiny_swin),
    ],
)
def test_torchvisions_layout_is_recognised_in_a_file(theirs, ours, tmp_path):
    torch.save(theirs().state_dict(), tmp_path / "model.pth")
    expected = checkpoints.from_torchvision(theirs().state_dict())
    assert expected.keys() == ours().state_dict().keys()
    state = checkpoints.read_backbone(tmp_path / "model.pth")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_the_mlp_names_of_torchvisions_older_files_convert_too():
    new = torchvisions_tiny_vit().state_dict()
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in new.items()
    }
    assert old.keys() != new.keys()
    assert checkpoints.from_torchvision(old).keys() == checkpoints.from_torchvision(new).keys()
    assert checkpoints.from_torchvision(old).keys() == tiny_vit().state_dict().keys()


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext, tiny_swin])
def test_our_own_layout_is_recognised_bare_and_in_a_file_of_a_run(build, tmp_path):
    expected = build().state_dict()
    for content in (expected, {"model": "a name", "factors": [5], "state_dict": expected}):
        torch.save(content, tmp_path / "model.pt")
        state = checkpoints.read_backbone(tmp_path / "model.pt")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "content, found",
    [
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
        ({}, "nothing"),
        ({"model": {}}, "nothing"),
        ({"model": "a name"}, "model"),
        ({"model": {"epoch": 3, "norm.weight": torch.ones(3)}}, "epoch"),
        ({0: torch.ones(3)}, "0"),
        ({"epoch": 3, "teacher": {"norm.weight": torch.ones(3)}}, "epoch, teacher"),
    ],
)
def test_a_file_without_weights_is_refused_and_says_what_it_holds(content, found, tmp_path):
    with pytest.raises(ValueError, match=f"model.pt holds no state dict of a model, but {found};"):
        read_back(content, tmp_path)


def test_code_beside_the_weights_is_refused_and_does_not_run(tmp_path):
    code = argparse.Namespace(flag=RunsCode(tmp_path / "executed"))
    with pytest.raises(OSError, match="model.pt is refused"):
        read_back({"model": tiny_vit().state_dict(), "args": code}, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_published_file_of_another_size_is_refused_by_key(tmp_path):
    for build, changes in ((tiny_vit, dict(dim=16)), (tiny_swin, dict(window=2))):
        state = checkpoints.read_backbone(publish(build(**changes), tmp_path))
        with pytest.raises(ValueError, match="another architecture: .* in the model"):
            checkpoints.load_backbone(build(), state)


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut_it(path, model):
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path, model):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def empty_it(path, model):
    path.write_bytes(b"")


def write_text(path, model):
    path.write_text("<html>not found</html>")


def write_one_array(path, model):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_a_torch_file(path, model):
    torch.save(model.state_dict(), path)


def pickle_an_array(path, model):
    code = np.array([RunsCode(path.parent / "executed")], dtype=object)
    np.savez(path, **published_vit(model) | {"head/bias": code})


def pickle_it_all(path, model):
    path.write_bytes(pickle.dumps(RunsCode(path.parent / "executed")))


def remove_it(path, model):
    path.unlink()


@pytest.mark.parametrize(
    "change, named",
    [
        (cut_it, "is broken"),
        (change_a_byte, "is broken"),
        (empty_it, "is broken"),
        (write_text, "is refused"),
        (write_one_array, "is broken or no .npz file"),
        (pickle_an_array, "is refused"),
        (pickle_it_all, "is refused"),
        (remove_it, "there is no file"),
    ],
)
def test_a_broken_npz_file_is_refused_and_runs_nothing(change, named, tmp_path):
    model = tiny_vit()
    path = publish(model, tmp_path)
    change(path, model)
    with pytest.raises(OSError, match=named) as caught:
        checkpoints.read_backbone(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def leave_a_query_out(arrays):
    del arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"]


def leave_the_embedding_out(arrays):
    del arrays["embedding/kernel"]


def make_a_kernel_not_fit_its_bias(arrays):
    arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"] = np.zeros((8, 31), "float32")


def flatten_the_patches(arrays):
    arrays["embedding/kernel"] = arrays["embedding/kernel"].reshape(-1, 8)


def read_features_for_pixels(arrays):
    arrays["embedding/kernel"] = np.zeros((1, 1, 64, 8), "float32")


def write_words(arrays):
    arrays["cls"] = np.array(["class"])


def be_something_else(arrays):
    arrays.clear()
    arrays["images"] = np.zeros((5, 4), "float32")


@pytest.mark.parametrize(
    "change",
    [
        leave_a_query_out,
        leave_the_embedding_out,
        make_a_kernel_not_fit_its_bias,
        flatten_the_patches,
        read_features_for_pixels,
        write_words,
        be_something_else,
    ],
)
def test_a_npz_file_of_something_else_is_refused_in_one_sentence(change, tmp_path):
    arrays = published_vit(tiny_vit())
    change(arrays)
    np.savez(tmp_path / "ViT.npz", **arrays)
    with pytest.raises(ValueError, match="ViT.npz holds no ViT as its authors .*: .") as caught:
        checkpoints.read_backbone(tmp_path / "ViT.npz")
    assert "\n" not in str(caught.value)


def test_arrays_that_the_vit_does_not_have_are_named(tmp_path):
    arrays = published_vit(tiny_vit()) | {"gn_root/scale": np.ones(8, "float32")}
    np.savez(tmp_path / "R50+ViT.npz", **arrays)
    state = checkpoints.read_backbone(tmp_path / "R50+ViT.npz")
    with pytest.raises(ValueError, match="gn_root.weight .*missing in the model"):
        checkpoints.load_backbone(tiny_vit(), state)


# ------------------------------------------------------------------------------------ downloads

BODY = bytes(range(256)) * 40
MD5 = "md5=" + base64.b64encode(hashlib.md5(BODY).digest()).decode()


class Handler(BaseHTTPRequestHandler):
    """Serves BODY, as server.does says: what follows is the honest server's way."""

    def do_GET(self):
        does, asked = self.server.does, self.headers.get("Range")
        self.server.asked.append(asked)
        start, size = 0, len(BODY)
        if does.get("code"):
            return self.send_error(does["code"])
        if asked and does.get("ranges", True):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= size:
                return self.send_error(416)
            self.send_response(206)
            named = f"bytes {start + does.get('off by', 0)}-{size - 1}/{does.get('total', size)}"
            self.send_header("Content-Range", named)
        else:
            self.send_response(200)
        if does.get("says its length", True):
            self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", '"00000000000000000000000000000000"')  # says nothing, as it may
        for value in does.get("hashes", ()):
            self.send_header("x-goog-hash", value)
        self.end_headers()
        self.wfile.write(BODY[start : does.get("until", size)])
        if does.get("resets"):
            self.wfile.flush()
            abort = struct.pack("ii", 1, 0)  # closed at once, without the other side's leave
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `does` changes its ways, `asked` holds the ranges asked for."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.does, server.asked = {}, []
        server.address = f"http://127.0.0.1:{server.server_port}/files/ViT.npz"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("hashes", [(), (f"crc32c=AAAAAA==,{MD5}",), ("crc32c=AAAAAA==", MD5)])
@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_file_is_fetched_whole(hashes, says_its_length, server, tmp_path):
    server.does = {"hashes": hashes, "says its length": says_its_length}
    checkpoints.download(server.address, tmp_path / "new" / "ViT.npz")
    assert (tmp_path / "new" / "ViT.npz").read_bytes() == BODY
    assert names(tmp_path / "new") == {"ViT.npz"} and server.asked == [None]


@pytest.mark.parametrize("does", [{}, {"resets": True}, {"resets": True, "says its length": False}])
def test_a_broken_connection_keeps_what_came_and_the_next_call_fetches_the_rest(
    does, server, tmp_path
):
    path, part = tmp_path / "ViT.npz", tmp_path / "ViT.npz.part"
    server.does = {"until": 5000, **does}
    with pytest.raises(OSError, match=f"{server.address}.*the same command resumes") as caught:
        checkpoints.download(server.address, path)
    assert "\n" not in str(caught.value) and names(tmp_path) == {part.name}
    held = part.stat().st_size
    assert BODY.startswith(part.read_bytes()) and held <= 5000
    size = len(BODY) if does.get("says its length", True) else "?"
    assert f"{held} of {size} bytes" in str(caught.value)
    server.does = {"until": 8000}
    with pytest.raises(OSError, match=f"8000 of {len(BODY)} bytes"):
        checkpoints.download(server.address, path)
    server.does = {"hashes": [MD5]}
    checkpoints.download(server.address, path)
    assert path.read_bytes() == BODY and names(tmp_path) == {path.name}
    assert server.asked[2] == "bytes=7999-"


@pytest.mark.parametrize("held", [BODY[:5000], b"something else" * 5000])
def test_a_server_that_ignores_ranges_starts_over(held, server, tmp_path):
    (tmp_path / "ViT.npz.part").write_bytes(held)
    server.does = {"ranges": False}
    checkpoints.download(server.address, tmp_path / "ViT.npz")
    assert (tmp_path / "ViT.npz").read_bytes() == BODY and server.asked != [None]


@pytest.mark.parametrize("held", [b"", BODY[:1], BODY[:-1], BODY])
def test_a_part_of_any_length_is_completed(held, server, tmp_path):
    (tmp_path / "ViT.npz.part").write_bytes(held)
    server.does = {"hashes": [MD5]}
    checkpoints.download(server.address, tmp_path / "ViT.npz")
    assert (tmp_path / "ViT.npz").read_bytes() == BODY


WRONG = "md5=" + base64.b64encode(hashlib.md5(b"").digest()).decode()


@pytest.mark.parametrize(
    "held, does, named",
    [
        (b"", {"hashes": [WRONG]}, f"MD5 {MD5[4:14]}.* instead of {WRONG[4:14]}"),
        (BODY[:4000], {"hashes": ["crc32c=AAAAAA==", WRONG]}, "MD5"),
        (b"x" + BODY[1:4000], {"hashes": [MD5]}, f"MD5 .* instead of {re.escape(MD5[4:])}"),
        (BODY[:4000], {"total": 9000}, f"size {len(BODY)} instead of 9000"),
        (BODY[:4000], {"off by": 1}, "another part"),
        (BODY + b"xx", {}, "was longer than http"),  # the answer is 416
    ],
)
def test_what_fails_the_check_is_removed(held, does, named, server, tmp_path):
    (tmp_path / "ViT.npz.part").write_bytes(held)
    server.does = does
    with pytest.raises(OSError, match=f"{named}.*the same command starts over") as caught:
        checkpoints.download(server.address, tmp_path / "ViT.npz")
    assert server.address in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == set()
    server.does = {}
    checkpoints.download(server.address, tmp_path / "ViT.npz")
    assert (tmp_path / "ViT.npz").read_bytes() == BODY


@pytest.mark.parametrize("code", [404, 503])
def test_a_server_that_has_no_such_file_leaves_what_was_there(code, server, tmp_path):
    (tmp_path / "ViT.npz.part").write_bytes(BODY[:4000])
    server.does = {"code": code}
    with pytest.raises(OSError, match=f"could not download {server.address} .*{code}"):
        checkpoints.download(server.address, tmp_path / "ViT.npz")
    assert (tmp_path / "ViT.npz.part").read_bytes() == BODY[:4000]


def test_without_a_network_the_message_says_what_to_fetch_and_where_to_put_it(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server.server_close()
    monkeypatch.setattr(checkpoints, "IMAGENET21K", {"vit_b16": server.address})
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(OSError, match=f"{server.address}.*put it in {folder}$"):
        checkpoints.backbone_state("imagenet21k", "vit_b16")


def test_imagenet21k_is_fetched_once_into_torchs_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(checkpoints, "IMAGENET21K", {"vit_b16": server.address})
    path = publish(tiny_vit(), tmp_path)
    monkeypatch.setitem(globals(), "BODY", path.read_bytes())
    first = checkpoints.backbone_state("imagenet21k", "vit_b16")
    server.does = {"code": 500}
    again = checkpoints.backbone_state("imagenet21k", "vit_b16")
    assert names(tmp_path / "torch" / "hub" / "checkpoints") == {"ViT.npz"}
    assert server.asked == [None] and first.keys() == again.keys()
    assert torch.equal(first["position"], tiny_vit().position)


@pytest.mark.parametrize("weights", ["imagenet1k", "imagenet21k"])
def test_a_model_without_published_weights_says_which_have_some(weights):
    with pytest.raises(ValueError, match=f"no {weights} weights for swin_micro; .*vit_l16.*swin_b"):
        checkpoints.backbone_state(weights, "swin_micro")


def test_every_published_backbone_has_both_kinds_of_weights():
    assert checkpoints.IMAGENET1K.keys() == checkpoints.IMAGENET21K.keys()
    files = {address.rpartition("/")[2] for address in checkpoints.IMAGENET21K.values()}
    assert len(files) == 6  # names of their own in the cache
