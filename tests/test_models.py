"""models.py: the backbones are the real architectures, and their links are METHOD.md's."""

import copy

import pytest
import torch
import torchvision
from tiny import (
    TINY_SWIN,
    difference,
    propagated_nowhere,
    random_images,
    randomise,
    reaching_new_functions,
    tiny_convnext,
    tiny_swin,
    tiny_vit,
    torchvisions_tiny_convnext,
    torchvisions_tiny_swin,
    torchvisions_tiny_vit,
)
from torch import nn

import models
import san
from lab import checkpoints
from models import SIZES, ConvNeXt, ConvNeXtBlock, Swin, SwinBlock, WindowAttention
from san import Link

MICRO = ["vit_micro", "convnext_micro", "swin_micro"]


def converted(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    checkpoints.load_backbone(ours, checkpoints.from_torchvision(theirs.state_dict()), head=True)
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
        ("swin_t", "swin_tiny"),
        ("swin_b", "swin_base"),
    ],
)
def test_torchvisions_model_converts_into_ours_and_gives_the_same_logits(theirs, ours):
    with torch.device("meta"):  # no time spent on values that are overwritten
        real = torchvision.models.get_model(theirs)
    real = randomise(real.to_empty(device="cpu"))
    for module in real.modules():
        if hasattr(module, "define_relative_position_index"):  # Swin's buffer is no random value
            module.define_relative_position_index()
    own = converted(real, models.build(ours, outputs=1000))
    images = random_images(224, count=1)
    assert real(images).std() > 0.1  # the logits say something
    assert difference(real, own, images) < 1e-4


# places a side in the two stages: 1 and 1; 3, one window, and 2; 5, odd to merge, and 3; 12 and 6
@pytest.mark.parametrize("size", [4, 12, 20, 50, (12, 28)])
def test_swin_pads_pictures_of_every_size_as_torchvision_does(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    images = random_images(64)[:, :, :height, :width]
    own = converted(torchvisions_tiny_swin(), tiny_swin())
    assert difference(torchvisions_tiny_swin(), own, images) < 1e-5


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


def forget_the_offsets(model):
    model.stages[0][0].attn.offset_bias.data.zero_()


def mirror_the_offsets(model):
    model.stages[0][0].attn.index = model.stages[0][0].attn.index.T


def forget_the_shift(model):
    model.stages[1][1].attn.shift = 0


def forget_the_mask(model):
    attention = model.stages[0][1].attn
    real = attention.apart
    attention.apart = lambda *numbers: torch.zeros_like(real(*numbers))


def merge_in_another_order(model):
    weight = model.downsample[0].reduction.weight
    weight.data = weight.data.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)


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
        (torchvisions_tiny_swin, tiny_swin, forget_the_offsets),
        (torchvisions_tiny_swin, tiny_swin, mirror_the_offsets),
        (torchvisions_tiny_swin, tiny_swin, forget_the_shift),
        (torchvisions_tiny_swin, tiny_swin, forget_the_mask),
        (torchvisions_tiny_swin, tiny_swin, merge_in_another_order),
    ],
)
def test_a_mistake_in_the_model_shows_in_the_logits(theirs, ours, mistake):
    own = converted(theirs(), ours())
    assert difference(theirs(), own, random_images(32)) < 1e-5
    mistake(own)
    assert difference(theirs(), own, random_images(32)) > 1e-3


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("vit_micro", 459_174),
        ("vit_mini", 1_205_382),
        ("vit_tiny", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_l16", 304_326_632),
        ("convnext_micro", 637_886),
        ("convnext_mini", 1_176_614),
        ("convnext_tiny", 28_589_128),
        ("convnext_base", 88_591_464),
        ("swin_micro", 566_530),
        ("swin_mini", 963_858),
        ("swin_tiny", 28_288_354),
        ("swin_base", 87_768_224),
    ],
)
def test_every_size_has_its_number_of_parameters_the_published_one_if_there_is_one(
    name, parameters
):
    with torch.device("meta"):
        model = models.build(name, outputs=6 if name.endswith(("micro", "mini")) else 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["vit_tiny", "vit_s16", "vit_b16", "vit_l16"])
def test_the_published_vits_have_heads_of_64_channels(name):
    with torch.device("meta"):
        model = models.build(name, outputs=1000)
    assert {model.head.in_features // block.attn.heads for block in model.blocks} == {64}


def test_the_sizes_are_the_fourteen_that_the_parameter_counts_cover():
    assert set(SIZES) == {
        *("vit_micro", "vit_mini", "vit_tiny", "vit_s16", "vit_b16", "vit_l16"),
        *("convnext_micro", "convnext_mini", "convnext_tiny", "convnext_base"),
        *("swin_micro", "swin_mini", "swin_tiny", "swin_base"),
    }


# ------------------------------------------------------------------------------- Swin's windows


def test_windows_are_squares_of_the_grid_and_go_back_to_their_places():
    x = torch.arange(2 * 6 * 9 * 2).view(2, 6, 9, 2)
    windows = models.to_windows(x, 3)
    assert windows.shape == (2, 6, 9, 2)
    assert torch.equal(windows[1, 5], x[1, 3:6, 6:9].flatten(0, 1))  # the last of 2×3 windows
    assert torch.equal(models.from_windows(windows, 3, height=6), x)


# where each row or column of the grid ends up, by letters: attention stays within one letter
@pytest.mark.parametrize(
    "shift, rows, columns",
    [
        (0, "aaaabbbb", "aaaabbbbcccc"),
        (2, "aabbbbcc", "aabbbbccccdd"),
        (1, "abbbbccc", "abbbbccccddd"),
        (2, "aaaa", "aabbbbcc"),  # a side of one window is not shifted
        (2, "aaaa", "aaaa"),
    ],
)
@torch.no_grad()
def test_a_place_is_seen_within_its_own_part_of_a_window_alone(shift, rows, columns):
    torch.manual_seed(0)
    attention = randomise(WindowAttention(dim=4, heads=2, window=4, shift=shift)).double()
    height, width = len(rows), len(columns)
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    # one picture for each place, changed there
    change = torch.eye(height * width, dtype=torch.float64).view(-1, height, width, 1)
    seen = (attention(x + change) - attention(x)).abs().amax(-1) > 1e-9  # HW H W
    parts = [row + column for row in rows for column in columns]
    expected = torch.tensor([[one == other for other in parts] for one in parts])
    assert torch.equal(seen.flatten(1), expected)


def test_the_offset_bias_is_one_number_for_each_offset():
    index = WindowAttention(dim=4, heads=2, window=3, shift=0).index
    places = [(y, x) for y in range(3) for x in range(3)]
    offsets = [(a - c + 2) * 5 + (b - d + 2) for a, b in places for c, d in places]
    assert index.flatten().tolist() == offsets
    assert "stages.0.0.attn.index" not in tiny_swin().state_dict()


# ---------------------------------------------------------------------------------- building


def test_an_unknown_model_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="vit_b61.*vit_b16.*convnext_base"):
        models.build("vit_b61", outputs=5)


@pytest.mark.parametrize(
    "name, image_size",
    [
        ("vit_micro", 30),  # patches of 4
        ("vit_b16", 225),  # patches of 16
        ("swin_micro", 1),  # patches of 2
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


# -------------------------------------------------------------------------------------- links

VALUES = [16, 17, 18, 19, 20, 21, 22, 23]  # of qkv's 3 × 8 outputs


def plain(links: list[Link]) -> list[tuple]:
    return [(layer, anterior, index and list(index)) for layer, anterior, index in links]


def test_vits_links_are_those_of_the_method():
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


def test_swins_links_are_those_of_the_method():
    assert plain(tiny_swin(depths=(2, 1)).links()) == [
        ("patch_embed", None, None),
        ("stages.0.0.attn.qkv", "patch_embed", None),
        ("stages.0.0.attn.proj", "stages.0.0.attn.qkv", VALUES),
        ("stages.0.0.mlp.fc1", "stages.0.0.attn.proj", None),
        ("stages.0.0.mlp.fc2", "stages.0.0.mlp.fc1", None),
        ("stages.0.1.attn.qkv", "stages.0.0.mlp.fc2", None),
        ("stages.0.1.attn.proj", "stages.0.1.attn.qkv", VALUES),
        ("stages.0.1.mlp.fc1", "stages.0.1.attn.proj", None),
        ("stages.0.1.mlp.fc2", "stages.0.1.mlp.fc1", None),
        ("downsample.0.reduction", "stages.0.1.mlp.fc2", [c % 8 for c in range(32)]),
        ("stages.1.0.attn.qkv", "downsample.0.reduction", None),
        ("stages.1.0.attn.proj", "stages.1.0.attn.qkv", [*range(32, 48)]),
        ("stages.1.0.mlp.fc1", "stages.1.0.attn.proj", None),
        ("stages.1.0.mlp.fc2", "stages.1.0.mlp.fc1", None),
    ]


@pytest.mark.parametrize("name", MICRO)
def test_every_layer_but_the_head_is_linked(name):
    model = models.build(name, outputs=5)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {link.layer for link in model.links()} == layers - {"head"}


@pytest.mark.parametrize(
    "name, wiring", [("vit_micro", ["authors"]), *((name, []) for name in MICRO)]
)
def test_links_attach_and_leave_the_output_exactly_as_it_was(name, wiring):
    model = randomise(models.build(name, outputs=5))
    base = copy.deepcopy(model)
    san.attach(model, model.links(*wiring), shift=True)
    assert difference(base, model, random_images(32)) == 0
    assert len(san.summary(model)["layers"]) == len(base.links(*wiring))


@torch.no_grad()
def test_swins_cheap_form_its_explicit_form_and_its_merge_agree(monkeypatch):
    base = randomise(models.build("swin_micro", outputs=5)).double()
    model, images = copy.deepcopy(base), random_images(32).double()
    san.attach(model, model.links(), shift=True)
    assert model.downsample[0].reduction.beta is None  # no bias that could hold it
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "beta")):
            parameter += 0.1 * torch.randn_like(parameter)
    cheap = model(images)
    assert (cheap - base(images)).abs().max() > 0.1
    with monkeypatch.context() as patch:
        patch.setattr(san.SANLayer, "forward", san.SANLayer.forward_explicit)
        assert (cheap - model(images)).abs().max() < 1e-12
    san.merge(model)
    assert (cheap - model(images)).abs().max() < 1e-12
    assert model.state_dict().keys() == base.state_dict().keys()


def test_a_wiring_that_vit_does_not_have_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'autors'.*'san'.*'authors'"):
        tiny_vit().links("autors")


QUERIES_AND_KEYS = [*range(16)]  # of qkv's 3 × 8 outputs


@pytest.mark.parametrize(
    "model, wiring, expected",
    [
        (
            tiny_vit(),
            [],
            {
                "blocks.0.attn.qkv": QUERIES_AND_KEYS,
                "blocks.1.attn.qkv": QUERIES_AND_KEYS,
                "blocks.1.mlp.fc2": [*range(8)],
            },
        ),
        (
            tiny_vit(),
            ["authors"],
            {f"blocks.{i}.attn.qkv": [*range(24)] for i in range(2)}
            | {f"blocks.{i}.mlp.fc2": [*range(8)] for i in range(2)},
        ),
        (tiny_convnext(), [], {"stages.1.1.pwconv2": [*range(8)]}),
        (
            tiny_swin(depths=(1, 1)),
            [],
            {
                "stages.0.0.attn.qkv": QUERIES_AND_KEYS,
                "stages.1.0.attn.qkv": [*range(32)],
                "stages.1.0.mlp.fc2": [*range(16)],
            },
        ),
    ],
    ids=["vit", "vit, authors", "convnext", "swin"],
)
def test_these_scales_are_propagated_nowhere(model, wiring, expected):
    assert propagated_nowhere(model, model.links(*wiring)) == expected


@pytest.mark.parametrize(
    "model, wiring, shift, norms, expected",
    [
        (tiny_vit(), [], True, True, ["fc2"]),
        (tiny_vit(), [], False, True, ["fc2"]),
        (tiny_vit(), [], True, False, ["qkv", "fc1", "fc2"]),
        (tiny_vit(), ["authors"], True, True, ["fc2"]),
        (tiny_swin(depths=(2, 1)), [], True, True, ["fc2"]),
        (tiny_swin(depths=(2, 1)), [], True, False, ["qkv", "fc1", "fc2", "reduction"]),
        (tiny_convnext(), [], True, True, ["pwconv2"]),
        (tiny_convnext(), [], False, True, ["pwconv2", "dwconv"]),
        (tiny_convnext(), [], True, False, ["pwconv1", "pwconv2", "downsample.0.1"]),
    ],
    ids=["vit", "vit, no shift", "vit, frozen norms", "vit, authors", "swin", "swin, frozen norms"]
    + ["convnext", "convnext, no shift", "convnext, frozen norms"],
)
def test_propagation_reaches_new_functions_in_these_layers_alone(
    model, wiring, shift, norms, expected
):
    images = random_images(32, count=200).double()
    links = model.links(*wiring)
    reaching = reaching_new_functions(model.double(), links, images, shift=shift, norms=norms)
    linked = {link.layer for link in links if link.anterior is not None}
    assert reaching == {layer for layer in linked if layer.endswith(tuple(expected))}


@torch.no_grad()
def test_a_last_writers_scale_acts_on_what_it_adds_and_propagated_on_the_whole_stream():
    base = tiny_vit().double()
    gamma, images = torch.linspace(-1, 2, 8, dtype=torch.float64), random_images(32).double()

    def first_qkv_reads(**one_use):
        model, seen = copy.deepcopy(base), []
        san.attach(model, model.links(), **one_use)
        for scale in (torch.ones_like(gamma), gamma):
            model.patch_embed.gamma.copy_(scale)
            hook = model.blocks[0].attn.qkv.layer.register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
            model(images)
            hook.remove()
        return seen  # before and after, each B N C

    before, after = first_qkv_reads(propagate=False)
    assert torch.equal(before[:, 0], after[:, 0])  # the class token is not what it wrote
    assert (before[:, 1:] - after[:, 1:]).abs().max() > 0.1
    before, after = first_qkv_reads(scale=False)
    assert (gamma * before - after).abs().max() < 1e-12


# Two places where γ on the posterior's columns is γ on the channels that the anterior gives: the
# exact row of ViT's and Swin's tables, and ConvNeXt's dwconv, whose output c reads input c alone.


def propagating(model: nn.Module, anterior: str, gamma: torch.Tensor) -> nn.Module:
    """The model with one γ, `anterior`'s, acting on its posterior layers' weights alone."""
    model = copy.deepcopy(model)
    san.attach(model, model.links(), scale=False)
    model.get_submodule(anterior).gamma.data.copy_(gamma)
    return model


@pytest.mark.parametrize(
    "build, attention",
    [
        (tiny_vit, "blocks.0.attn"),
        (tiny_swin, "stages.0.0.attn"),
        (tiny_swin, "stages.0.1.attn"),  # shifted, masked
    ],
)
def test_propagating_the_value_scale_into_proj_scales_the_values_themselves(build, attention):
    base = build().double()
    gamma = torch.linspace(-1, 2, 24, dtype=torch.float64)
    adapted = propagating(base, f"{attention}.qkv", gamma)
    explicit = copy.deepcopy(base)
    for parameter in explicit.get_submodule(attention).qkv.parameters():
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


def test_the_reductions_index_names_the_channel_that_each_merged_channel_carries():
    model = tiny_swin().double()
    index = {link.layer: link.index for link in model.links()}["downsample.0.reduction"]
    merging = copy.deepcopy(model.downsample[0])
    merging.norm = nn.Identity()  # what it adds to the scale is not the index's concern
    x = torch.randn(1, 5, 4, 8, dtype=torch.float64)  # five rows: padded
    gamma = torch.linspace(-1, 2, 8, dtype=torch.float64)
    scaled = merging(gamma * x)
    merging.reduction.weight.data *= gamma[index]
    assert torch.allclose(merging(x), scaled, atol=1e-12)


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


@torch.no_grad()
@pytest.mark.parametrize("silent", ["attn.proj", "mlp.fc2"])
def test_each_branch_of_swins_blocks_is_dropped_by_whole_pictures(silent):
    torch.manual_seed(0)
    block = randomise(SwinBlock(dim=4, heads=2, window=2, shift=1, drop_path=0.25))
    for parameter in block.get_submodule(silent).parameters():
        parameter.zero_()
    pictures = torch.randn(1, 4, 4, 4).expand(2000, -1, -1, -1)
    branch = block(pictures) - pictures
    noisy = block.train()(pictures) - pictures
    dropped = (noisy == 0).flatten(1).all(1)
    assert torch.allclose(noisy[~dropped], branch[~dropped] / 0.75, atol=1e-5)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    "model",
    [
        ConvNeXt(5, 32, depths=(2, 3), dims=(4, 8), drop_path=0.4),
        Swin(5, **TINY_SWIN | dict(depths=(2, 3), drop_path=0.4)),
    ],
    ids=["convnext", "swin"],
)
def test_deeper_blocks_drop_more_often_up_to_the_rate_given(model):
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
