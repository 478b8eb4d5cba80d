"""models.py: the backbones are the real architectures, and their links are METHOD.md's."""

import copy
from functools import cache

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

import models
import san
from models import SIZES, ConvNeXt, ConvNeXtBlock, ViT
from san import Link

TINY_VIT = dict(image_size=32, patch=8, dim=8, depth=2, heads=2)
TINY_CONVNEXT = dict(image_size=32, depths=(1, 2), dims=(4, 8), drop_path=0.0)
MICRO = ["vit_micro", "convnext_micro"]


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


def random_images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    return (one(images) - other(images)).abs().max().item()


def converted(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    models.load_backbone(ours, models.from_torchvision(theirs.state_dict()), head=True)
    return ours.eval()


# ---------------------------------------------------------------- the real architectures


# ViT-L and its 304 million parameters are left to a check by hand.
@torch.no_grad()
@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("vit_b_16", "vit_b16"),
        ("convnext_tiny", "convnext_tiny"),
        ("convnext_base", "convnext_base"),
    ],
)
def test_torchvisions_model_converts_into_ours_and_gives_the_same_logits(theirs, ours):
    with torch.device("meta"):  # no time spent on values that are overwritten
        real = torchvision.models.get_model(theirs)
    real = randomise(real.to_empty(device="cpu"))
    own = converted(real, models.build(ours, outputs=1000))
    images = random_images(224, count=1)
    assert real(images).std() > 0.1  # the logits say something
    assert difference(real, own, images) < 1e-4


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


def drop_class_token(model):
    model.class_token.data.zero_()


def swap_queries_and_values(model):
    weight = model.blocks[0].attn.qkv.weight.data
    weight.copy_(torch.cat(weight.chunk(3)[::-1]))


def use_one_head(model):
    model.blocks[1].attn.heads = 1


def move_positions_by_one(model):
    model.position.data.copy_(model.position.data.roll(1, dims=1))


def forget_layer_scale(model):
    model.stages[1][0].layer_scale.data.fill_(1)


def skip_a_block(model):
    model.stages[1][1] = nn.Identity()


def use_another_norm_epsilon(model):
    model.stem[1].eps = 0.1


@pytest.mark.parametrize(
    "theirs, ours, mistake",
    [
        (torchvisions_tiny_vit, tiny_vit, drop_class_token),
        (torchvisions_tiny_vit, tiny_vit, swap_queries_and_values),
        (torchvisions_tiny_vit, tiny_vit, use_one_head),
        (torchvisions_tiny_vit, tiny_vit, move_positions_by_one),
        (torchvisions_tiny_convnext, tiny_convnext, forget_layer_scale),
        (torchvisions_tiny_convnext, tiny_convnext, skip_a_block),
        (torchvisions_tiny_convnext, tiny_convnext, use_another_norm_epsilon),
    ],
)
def test_a_mistake_in_the_model_shows_in_the_logits(theirs, ours, mistake):
    own = converted(theirs(), ours())
    assert difference(theirs(), own, random_images(32)) < 1e-5
    mistake(own)
    assert difference(theirs(), own, random_images(32)) > 1e-3


def test_the_mlp_names_of_torchvisions_older_files_convert_too():
    new = torchvisions_tiny_vit().state_dict()
    old = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in new.items()
    }
    assert old.keys() != new.keys()
    assert models.from_torchvision(old).keys() == models.from_torchvision(new).keys()
    assert models.from_torchvision(old).keys() == tiny_vit().state_dict().keys()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("vit_micro", 459_174),
        ("vit_tiny", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_l16", 304_326_632),
        ("convnext_micro", 637_886),
        ("convnext_tiny", 28_589_128),
        ("convnext_base", 88_591_464),
    ],
)
def test_every_size_has_its_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = models.build(name, outputs=6 if name in MICRO else 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["vit_tiny", "vit_s16", "vit_b16", "vit_l16"])
def test_the_published_vits_have_heads_of_64_channels(name):
    with torch.device("meta"):
        model = models.build(name, outputs=1000)
    assert {model.head.in_features // block.attn.heads for block in model.blocks} == {64}


def test_the_sizes_are_the_eight_that_the_parameter_counts_cover():
    assert set(SIZES) == {
        *("vit_micro", "vit_tiny", "vit_s16", "vit_b16", "vit_l16"),
        *("convnext_micro", "convnext_tiny", "convnext_base"),
    }


# ---------------------------------------------------------------------------------- building


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="vit_b61.*vit_b16.*convnext_base"):
        models.build("vit_b61", outputs=5)


@pytest.mark.parametrize(
    "name, image_size",
    [
        ("vit_micro", 30),  # patches of 4
        ("vit_b16", 225),  # patches of 16
        ("convnext_micro", 8),  # halved to nothing: 4 × 2 × 2 pixels become one
    ],
)
def test_an_image_size_that_does_not_fit_the_model_is_refused(name, image_size):
    with pytest.raises(ValueError, match=str(image_size)):
        models.build(name, outputs=5, image_size=image_size)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("image_size", [32, 48])
def test_a_model_gives_its_outputs_for_the_image_size_it_was_built_for(name, image_size):
    model = models.build(name, outputs=7, image_size=image_size)
    assert model(random_images(image_size)).shape == (2, 7)


# ---------------------------------------------------------------------------- loading weights


def test_positions_of_the_same_image_size_load_unchanged():
    source, model = tiny_vit(), ViT(5, **TINY_VIT)
    models.load_backbone(model, source.state_dict())
    assert torch.equal(model.position, source.position)


def test_positions_of_another_image_size_are_interpolated_and_the_class_token_is_kept():
    source, model = tiny_vit(), ViT(5, **{**TINY_VIT, "image_size": 64})
    rows = torch.arange(4.0).repeat_interleave(4)  # a 4×4 grid whose values tell their row
    source.position.data[:, 1:] = rows[None, :, None]
    models.load_backbone(model, source.state_dict())
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
        models.load_backbone(model, state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_the_other_kind_of_backbone_are_refused():
    with pytest.raises(ValueError, match="patch_embed|class_token|position"):
        models.load_backbone(tiny_vit(), tiny_convnext().state_dict())
    with pytest.raises(ValueError, match="stem"):
        models.load_backbone(tiny_convnext(), tiny_vit().state_dict())


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext])
@pytest.mark.parametrize("files_head", ["another size", "the same size", "none"])
def test_the_head_is_left_as_it_was_and_the_rest_is_loaded(build, files_head):
    state = build(outputs=5 if files_head == "the same size" else 9).state_dict()
    if files_head == "none":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    model = build(outputs=5)
    for parameter in model.parameters():
        parameter.data += 1
    head = copy.deepcopy(model.head.state_dict())
    models.load_backbone(model, state)
    for key, value in model.state_dict().items():
        expected = head[key[5:]] if key.startswith("head.") else state[key]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("build", [tiny_vit, tiny_convnext])
def test_the_head_is_loaded_where_it_is_asked_for(build):
    source, model = build(), build()
    model.head.weight.data.zero_()
    models.load_backbone(model, source.state_dict(), head=True)
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_head_of_another_size_is_refused_where_it_is_asked_for():
    with pytest.raises(ValueError, match="head.weight .*9.*5"):
        models.load_backbone(tiny_vit(), tiny_vit(outputs=9).state_dict(), head=True)


# -------------------------------------------------------------------------------------- links

VALUES = [16, 17, 18, 19, 20, 21, 22, 23]  # of qkv's 3 × 8 outputs


def plain(links: list[Link]) -> list[tuple]:
    return [(layer, anterior, index and list(index)) for layer, anterior, index in links]


def test_vits_exact_links_are_those_of_the_method():
    assert plain(tiny_vit().links()) == [
        ("patch_embed", None, None),
        ("blocks.0.attn.qkv", "patch_embed", None),
        ("blocks.0.attn.proj", "blocks.0.attn.qkv", VALUES),
        ("blocks.0.mlp.fc1", "blocks.0.attn.proj", None),
        ("blocks.0.mlp.fc2", "blocks.0.mlp.fc1", None),
        ("blocks.1.attn.qkv", "blocks.0.mlp.fc2", None),
        ("blocks.1.attn.proj", "blocks.1.attn.qkv", VALUES),
        ("blocks.1.mlp.fc1", "blocks.1.attn.proj", None),
        ("blocks.1.mlp.fc2", "blocks.1.mlp.fc1", None),
    ]


def test_vits_authors_wiring_reads_patch_embed_in_every_block_and_nothing_in_proj():
    assert plain(tiny_vit().links(wiring="authors")) == [
        ("patch_embed", None, None),
        ("blocks.0.attn.qkv", "patch_embed", None),
        ("blocks.0.attn.proj", None, None),
        ("blocks.0.mlp.fc1", "blocks.0.attn.proj", None),
        ("blocks.0.mlp.fc2", "blocks.0.mlp.fc1", None),
        ("blocks.1.attn.qkv", "patch_embed", None),
        ("blocks.1.attn.proj", None, None),
        ("blocks.1.mlp.fc1", "blocks.1.attn.proj", None),
        ("blocks.1.mlp.fc2", "blocks.1.mlp.fc1", None),
    ]


def test_convnexts_links_are_those_of_the_method():
    assert plain(tiny_convnext().links()) == [
        ("stem.0", None, None),
        ("stages.0.0.dwconv", "stem.0", None),
        ("stages.0.0.pwconv1", "stages.0.0.dwconv", None),
        ("stages.0.0.pwconv2", "stages.0.0.pwconv1", None),
        ("downsample.0.1", "stages.0.0.pwconv2", None),
        ("stages.1.0.dwconv", "downsample.0.1", None),
        ("stages.1.0.pwconv1", "stages.1.0.dwconv", None),
        ("stages.1.0.pwconv2", "stages.1.0.pwconv1", None),
        ("stages.1.1.dwconv", "stages.1.0.pwconv2", None),
        ("stages.1.1.pwconv1", "stages.1.1.dwconv", None),
        ("stages.1.1.pwconv2", "stages.1.1.pwconv1", None),
    ]


@pytest.mark.parametrize("name", MICRO)
def test_every_layer_but_the_head_is_linked(name):
    model = models.build(name, outputs=5)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {link.layer for link in model.links()} == layers - {"head"}


@pytest.mark.parametrize(
    "name, wiring", [("vit_micro", "exact"), ("vit_micro", "authors"), ("convnext_micro", "exact")]
)
def test_links_attach_and_leave_the_output_exactly_as_it_was(name, wiring):
    model = randomise(models.build(name, outputs=5))
    base = copy.deepcopy(model)
    san.attach(model, model.links(wiring), shift=True)
    assert difference(base, model, random_images(32)) == 0
    assert len(san.summary(model)["layers"]) == len(base.links(wiring))


@pytest.mark.parametrize(
    "build, wiring", [(tiny_vit, "autors"), (tiny_convnext, "authors"), (tiny_convnext, "autors")]
)
def test_a_wiring_that_the_backbone_does_not_have_is_refused(build, wiring):
    with pytest.raises(ValueError, match=f"'{wiring}'.*'exact'"):
        build().links(wiring)


# The two places where METHOD.md says that propagation is exact: nothing but a linear map of each
# channel lies between, so γ on the posterior's columns is γ on the channels it reads.


def propagating(model: nn.Module, anterior: str, gamma: torch.Tensor) -> nn.Module:
    """The model with one γ, `anterior`'s, acting on its posterior layers' weights alone."""
    model = copy.deepcopy(model)
    san.attach(model, model.links(), mode="propagation")
    model.get_submodule(anterior).gamma.data.copy_(gamma)
    return model


def test_propagating_the_value_scale_into_proj_scales_the_values_themselves():
    base = tiny_vit().double()
    gamma = torch.linspace(-1, 2, 24, dtype=torch.float64)
    adapted = propagating(base, "blocks.0.attn.qkv", gamma)
    explicit = copy.deepcopy(base)
    for parameter in explicit.blocks[0].attn.qkv.parameters():
        parameter.data[VALUES] = torch.einsum("c,c...->c...", gamma[VALUES], parameter.data[VALUES])
    images = random_images(32).double()
    assert difference(base, adapted, images) > 0.01
    assert difference(explicit, adapted, images) < 1e-12


def test_propagating_the_stem_scale_into_dwconv_scales_its_output_channels():
    base = tiny_convnext().double()
    gamma = torch.linspace(-1, 2, 4, dtype=torch.float64)
    adapted = propagating(base, "stem.0", gamma)
    explicit = copy.deepcopy(base)
    explicit.stages[0][0].dwconv.weight.data *= gamma.view(4, 1, 1, 1)
    images = random_images(32).double()
    assert difference(base, adapted, images) > 0.01
    assert difference(explicit, adapted, images) < 1e-12


# --------------------------------------------------------------------------- stochastic depth


@torch.no_grad()
def test_stochastic_depth_drops_whole_pictures_in_training_and_keeps_the_mean():
    torch.manual_seed(0)
    block = randomise(ConvNeXtBlock(dim=2, drop_path=0.25))
    pictures = torch.randn(1, 2, 1, 1).expand(4000, -1, -1, -1)
    branch = block(pictures) - pictures
    assert torch.equal(block(pictures), block(pictures))  # evaluating: no chance in it
    noisy = block.train()(pictures) - pictures
    dropped = (noisy == 0).all(1).flatten()
    assert torch.allclose(noisy[~dropped], branch[~dropped] / 0.75, atol=1e-6)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(noisy.mean(0), branch.mean(0), rtol=0.05)


def test_deeper_blocks_drop_more_often_up_to_the_rate_given():
    model = ConvNeXt(5, 32, depths=(2, 3), dims=(4, 8), drop_path=0.4)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
