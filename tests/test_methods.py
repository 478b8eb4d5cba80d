"""lab/methods.py: what each method trains, how it starts, and that it folds exactly."""

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_images, randomise, tiny_vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import models
import san
from lab import loop, methods

ROOT = Path(__file__).parent.parent
OPTIONS = argparse.Namespace(
    wiring="san", mode="both", shift=False, rank=4, alpha=None, norms=True, gamma_std=0.0, prompts=3
)
TINY = dict(vocab=19, dim=32, depth=2, heads=4, kv_heads=2, hidden=48, context=32)
LOW_RANK = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj", "mlp.down_proj")
ALL = (*LOW_RANK, "attn.o_proj", "mlp.gate_proj")
NORMS = {"norm", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"}
SCALING = ("ia3", "ssf", "hyperadapt", "san", "san2")
ADDING = ("lora", "dora", *SCALING, "san+lora", "san+dora")  # layers, to a LLaMA
MICRO = ("vit_micro", "swin_micro", "convnext_micro")
SECOND = ("mlp.fc2", "pwconv2", "mlp.down_proj")  # IA³ scales them at their input

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def llama(dtype: torch.dtype = torch.float64, **changes) -> models.LLaMA:
    """A tiny LLaMA in which every parameter matters; norms in float32 at least, as when loaded."""
    torch.manual_seed(0)
    model = models.LLaMA(**TINY | changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(mean=1, std=0.3)
        else:
            parameter.normal_(std=1 if "embed" in name else parameter.shape[1] ** -0.5)
        wide = torch.promote_types(dtype, torch.float32)
        parameter.data = parameter.to(wide if "norm" in name else dtype)
    return model


def adapted(method: str, dtype: torch.dtype = torch.float64, **changes) -> models.LLaMA:
    model = llama(dtype, **changes)
    methods.adapt(model, method, OPTIONS)
    return model


@torch.no_grad()
def train(model: nn.Module) -> nn.Module:
    """Stands for training: all that is trained moves, and farther than it would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_tokens() -> torch.Tensor:
    return torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(2))  # B N


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def structure(model: nn.Module) -> tuple:
    """Classes by name, shapes by key, and the number of parameters, a tied one counted once."""
    classes = {name: type(module) for name, module in model.named_modules()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return classes, shapes, sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------- one layer at a time


def frozen(shape: str, bias: bool) -> tuple[nn.Module, torch.Tensor]:
    """A layer, and what it may read."""
    torch.manual_seed(0)
    if shape == "linear":
        return nn.Linear(9, 7, bias).requires_grad_(False), torch.randn(4, 5, 9)
    outputs, groups = {"conv": (7, 1), "grouped": (8, 2), "depthwise": (6, 6)}[shape]
    layer = nn.Conv2d(6, outputs, (3, 2), stride=2, padding=1, groups=groups, bias=bias)
    return layer.requires_grad_(False), torch.randn(4, 6, 5, 5)


def ours_and_pefts(
    kind: str, layer: nn.Module
) -> tuple[methods.LoRALayer | methods.DoRALayer, nn.Module]:
    """The same layer twice, with the same A, B and m, none of them at its start; α is not r."""
    peft = pytest.importorskip("peft", reason="the reference is PEFT's layer; pip install peft")
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["layer"], use_dora=kind == "dora", lora_dropout=0.0
    )
    theirs = peft.inject_adapter_in_model(config, model)["layer"]
    own = (methods.DoRALayer if kind == "dora" else methods.LoRALayer)(layer, rank=3, alpha=5)
    with torch.no_grad():
        for one, other in zip(trained_of(own), trained_of(theirs), strict=True):
            other += 0.5 * torch.randn_like(other)
            one.copy_(other.view_as(one))
    return own, theirs


def trained_of(layer: nn.Module) -> list[nn.Parameter]:
    """A, B and, in DoRA, m, of a layer of ours or of PEFT's."""
    order = ("a", "b", "m", "lora_A", "lora_B", "lora_magnitude_vector")
    named = {name.partition(".")[0]: p for name, p in layer.named_parameters() if p.requires_grad}
    return [named[name] for name in order if name in named]


each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
each_kind = pytest.mark.parametrize("kind", ["lora", "dora"])
each_shape = pytest.mark.parametrize("shape", ["linear", "conv", "grouped", "depthwise"])


@each_kind
@each_bias
@pytest.mark.parametrize("shape", ["linear", "conv"])  # PEFT merges no grouped convolution
def test_output_gradients_and_merged_weight_are_those_of_pefts_layer(kind, bias, shape):
    base, x = frozen(shape, bias)
    own, theirs = ours_and_pefts(kind, base)
    assert len(trained_of(own)) == (3 if kind == "dora" else 2)
    weights = torch.randn_like(base(x))
    results = []
    for layer in (own, theirs):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        (output * weights).sum().backward()
        results.append([output, inputs.grad, *(p.grad for p in trained_of(layer))])
    for one, other in zip(*results, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other.view_as(one), atol=1e-5, rtol=1e-5)
    assert own.layer.weight.grad is None
    theirs.merge()
    merged = own.merged()
    assert merged is base
    torch.testing.assert_close(merged.weight, theirs.get_base_layer().weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged(x), theirs(x), atol=1e-5, rtol=1e-5)


@each_kind
@each_bias
@each_shape
def test_a_layer_starts_as_the_frozen_one_and_merges_exactly(kind, bias, shape):
    layer, x = (each.double() for each in frozen(shape, bias))
    expected = layer(x)
    own = (methods.DoRALayer if kind == "dora" else methods.LoRALayer)(layer, rank=3, alpha=5)
    assert difference(own(x), expected) < 1e-14
    bound = layer.weight[0].numel() ** -0.5  # Kaiming: up to 1 / √in
    assert (own.b == 0).all() and 0.3 * bound < own.a.abs().max() <= bound
    output = train(own)(x)
    assert difference(output, expected) > 0.1
    assert difference(own.merged()(x), output) < 1e-13


@each_bias
@each_shape
def test_column_scales_start_at_one_act_on_their_columns_and_merge_exactly(bias, shape):
    layer, x = (each.double() for each in frozen(shape, bias))
    base, own = copy.deepcopy(layer), methods.ColumnLayer(layer)
    assert own.a.shape == (x.shape[-1 if shape == "linear" else 1],)
    assert torch.equal(own(x), base(x)) and own.bias is layer.bias
    output = train(own)(x)
    assert difference(output, base(x)) > 0.1
    weight, groups = own.merged().weight, getattr(layer, "groups", 1)
    assert difference(layer(x), output) < 1e-13
    outputs, inputs = weight.shape[:2]
    for row in range(outputs):
        for column in range(inputs):
            scale = own.a[row // (outputs // groups) * inputs + column]
            assert difference(weight[row, column], scale * base.weight[row, column]) < 1e-15


def test_doras_length_is_a_constant_to_the_gradient():
    torch.manual_seed(0)
    own = train(methods.DoRALayer(nn.Linear(9, 7).double().requires_grad_(False), 3, alpha=5))
    x, weights = torch.randn(4, 9).double(), torch.randn(4, 7).double()

    def gradients(output: torch.Tensor) -> tuple:
        parameters = [own.a, own.b, own.m]
        return torch.autograd.grad((output * weights).sum(), parameters, retain_graph=True)

    updated = own.layer.weight + 5 / 3 * own.b @ own.a
    length = updated.norm(dim=1)
    constant = gradients(x @ updated.T * own.m / length.detach())
    whole = gradients(x @ updated.T * own.m / length)
    for one, other in zip(gradients(own(x)), constant, strict=True):
        assert difference(one, other) < 1e-12
    assert all(difference(one, other) > 0.01 for one, other in zip(constant[:2], whole[:2]))


# -------------------------------------------------------------------------------- a whole LLaMA


def layers(parts: tuple) -> list[str]:
    return [f"blocks.{i}.{part}" for i in range(2) for part in parts]


def low_rank(inside: str, *values: str) -> set[str]:
    return {f"{name}{inside}.{value}" for name in layers(LOW_RANK) for value in values}


SCALES = {f"{name}.gamma" for name in layers(ALL)} | {f"{name}.weight" for name in NORMS}
IN_BLOCK_0 = {f"blocks.0.attn.{name}_proj" for name in "qkv"}  # no γ' comes to them
TRAINED = {
    "linear": {"norm.weight", "head.weight"},
    "norm": {f"{name}.weight" for name in NORMS},
    "full": {name for name, _ in models.LLaMA(**TINY).named_parameters()},
    "lora": low_rank("", "a", "b"),
    "dora": low_rank("", "a", "b", "m"),
    "ia3": {f"{n}.{'a' if n.endswith(SECOND) else 'gamma'}" for n in layers(ALL)},
    "ssf": SCALES,  # no β: a LLaMA's layers have no bias that could take it in
    "hyperadapt": SCALES | {f"{name}.layer.a" for name in layers(ALL)},
    "san": SCALES,
    "san2": SCALES | {f"{name}.layer.a" for name in {*layers(ALL)} - IN_BLOCK_0},
    "san+lora": SCALES | low_rank(".layer", "a", "b"),
    "san+dora": SCALES | low_rank(".layer", "a", "b", "m"),
}


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_trains_this_and_nothing_else(method):
    model = adapted(method)
    assert trained_names(model) == TRAINED[method]
    model(random_tokens()).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == TRAINED[method]


def test_low_rank_names_linked_layers():
    assert {*methods.LOW_RANK} < {link.layer.rpartition(".")[2] for link in llama().links()}


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ADDING)
def test_the_output_starts_as_the_base_models_and_folds_exactly(method, tied):
    base, model, tokens = llama(tied=tied), adapted(method, tied=tied), random_tokens()
    expected = base(tokens)
    assert difference(model(tokens), expected) < 1e-12
    output = train(model)(tokens)
    assert difference(output, expected) > 0.1
    methods.fold(model)
    assert difference(model(tokens), output) < 1e-10
    assert structure(model) == structure(base)
    assert (model.head.weight is model.embed.weight) == tied


@torch.no_grad()
@pytest.mark.parametrize("method", ["linear", "norm", "full"])
def test_what_adds_no_layers_folds_into_itself(method):
    model, tokens = train(adapted(method)), random_tokens()
    expected = model(tokens)
    methods.fold(model)
    assert structure(model) == structure(llama())
    assert torch.equal(model(tokens), expected)


ANTERIOR = {
    "attn.o_proj": "attn.v_proj",
    "mlp.gate_proj": "attn.o_proj",
    "mlp.up_proj": "attn.o_proj",
    "mlp.down_proj": "mlp.up_proj",
}


def gamma_read_by(name: str, state: dict) -> torch.Tensor | float:
    """γ' of a layer, by METHOD.md's table."""
    _, i, part = name.split(".", 2)
    if part not in ANTERIOR:  # q, k, v
        return state["blocks.0.mlp.down_proj.gamma"] if i == "1" else 1.0
    gamma = state[f"blocks.{i}.{ANTERIOR[part]}.gamma"]
    if part == "attn.o_proj":  # 4 query heads of 8 channels share 2 value heads
        gamma = gamma.view(2, 8)[[0, 0, 1, 1]].flatten()
    return gamma


def formula(method: str, base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """diag(γ) V diag(γ') of every layer in float64, V = W, W + B A or m ⊙ (W + B A) / ‖W + B A‖.

    α is r here, so that α/r is 1. In hyperadapt and ia3 an own a stands in the place of γ', in san2
    beside it; SSF has neither.
    """
    state = {key: value.double() for key, value in model.state_dict().items()}
    weights = {}
    for name in layers(ALL):
        weight = base.get_submodule(name).weight.detach().double()
        inside = f"{name}.layer" if f"{name}.layer.a" in state else name
        if f"{inside}.b" in state:
            weight = weight + state[f"{inside}.b"] @ state[f"{inside}.a"]
        if f"{inside}.m" in state:
            weight = state[f"{inside}.m"][:, None] * weight / weight.norm(dim=1, keepdim=True)
        elif method in SCALING and f"{inside}.a" in state:
            weight = weight * state[f"{inside}.a"]
        if method.startswith("san"):
            weight = weight * gamma_read_by(name, state)
        if f"{name}.gamma" in state:
            weight = state[f"{name}.gamma"][:, None] * weight
        weights[name] = weight
    return weights


@pytest.mark.parametrize("method", ADDING)
def test_the_folded_weights_are_the_formulas(method):
    base, model = llama(), train(adapted(method))
    expected, changed = formula(method, base, model), set()
    methods.fold(model)
    for name, weight in expected.items():
        folded = model.get_submodule(name).weight
        assert difference(folded, weight) < 1e-12, name
        if difference(folded, base.get_submodule(name).weight) > 0.01:
            changed.add(name)
    assert changed == {*layers(LOW_RANK if method in ("lora", "dora") else ALL)}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (4, 1), (8, 2)])
def test_the_update_is_scaled_by_alpha_over_the_rank_of_4(alpha, scale):
    model = llama()
    methods.adapt(model, "san+dora", loop.changed(OPTIONS, alpha=alpha))
    updated = [m for m in model.modules() if isinstance(m, methods.LoRALayer)]
    assert len(updated) == 10 and {layer.scale for layer in updated} == {scale}


@pytest.mark.parametrize("method", ADDING)
def test_bfloat16_weights_are_tuned_in_float32_and_fold_into_bfloat16(method):
    base, model, tokens = llama(torch.bfloat16), adapted(method, torch.bfloat16), random_tokens()
    for name, parameter in train(model).named_parameters():
        wide = parameter.requires_grad or "norm" in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    output = model(tokens)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    expected = formula(method, base, model)
    methods.fold(model)
    assert structure(model) == structure(base)
    # of the update or the column scales, then of the other scales
    roundings = 2 if "+" in method or method in ("hyperadapt", "san2") else 1
    for name, weight in expected.items():
        folded = model.get_submodule(name).weight
        assert folded.dtype == torch.bfloat16
        assert ((folded - weight).abs() <= 1.01 * roundings * 2**-8 * weight.abs()).all(), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_micro", "convnext_micro"])
def test_a_vision_model_gets_lora_on_every_linked_layer_and_trains_its_head(name):
    torch.manual_seed(0)
    base, images = models.build(name, 3).double(), torch.randn(2, 3, 32, 32).double()
    model = copy.deepcopy(base)
    methods.adapt(model, "lora", OPTIONS)
    updates = {f"{link.layer}.{part}" for link in base.links() for part in "ab"}
    assert trained_names(model) == updates | {"head.weight", "head.bias"}
    assert difference(model(images), base(images)) == 0
    output = train(model)(images)
    assert difference(output, base(images)) > 0.1
    methods.fold(model)
    assert difference(model(images), output) < 1e-10
    assert structure(model) == structure(base)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_micro", "convnext_micro", "swin_micro"])
def test_bias_trains_the_biases_and_the_head(name):
    model = models.build(name, 3)
    methods.adapt(model, "bias", OPTIONS)
    expected = {key for key in model.state_dict() if key.split(".")[-1] == "bias"} | {"head.weight"}
    assert trained_names(model) == expected and "norm.bias" in expected


@torch.no_grad()
def test_a_prompted_vit_attends_to_the_prompts_of_each_block_and_drops_the_last_blocks():
    torch.manual_seed(0)
    base, images = (
        models.ViT(3, 8, patch=4, dim=12, depth=3, heads=2).double(),
        torch.randn(2, 3, 8, 8),
    )
    images, model = images.double(), copy.deepcopy(base)
    methods.adapt(model, "vpt", OPTIONS)
    prompts = {f"blocks.{i}.prompts" for i in range(3)}
    assert trained_names(model) == prompts | {"head.weight", "head.bias"}
    assert difference(model(images), base(images)) > 1e-6
    train(model)

    x = base.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([base.class_token.expand(2, -1, -1), x], 1) + base.position  # 2 × 1+4 × 12
    for block, prompted in zip(base.blocks, model.blocks):
        x = block(torch.cat([x, prompted.prompts.expand(2, -1, -1)], 1))[:, :5]
    assert difference(model(images), model.head(base.norm(x[:, 0]))) < 1e-12
    before = model(images)
    methods.fold(model)
    assert torch.equal(model(images), before)


def test_vpt_is_for_a_vit():
    with pytest.raises(ValueError, match="ViT's tokens, and this is a ConvNeXt"):
        methods.adapt(models.build("convnext_micro", 3), "vpt", OPTIONS)


@torch.no_grad()
def test_gamma_may_start_around_one_and_the_norms_stay_frozen():
    model = models.build("vit_micro", 3)
    changes = {"norms": False, "gamma_std": 0.02, "shift": True}
    methods.adapt(model, "san", argparse.Namespace(**vars(OPTIONS) | changes))
    names = {key.split(".")[-1] for key in trained_names(model)}
    assert names == {"gamma", "beta", "weight", "bias"}  # the last two are the head's
    assert {key for key in trained_names(model) if "norm" in key} == set()
    gammas = torch.cat([p.flatten() for key, p in model.named_parameters() if "gamma" in key])
    assert abs(gammas.mean() - 1) < 0.003 and 0.018 < gammas.std() < 0.022


# --------------------------------------------------------------------------- on pictures' models


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**vars(OPTIONS) | {"shift": True} | changes)


def base_and_adapted(name: str, method: str, **changes) -> tuple[nn.Module, nn.Module]:
    """A vision model in float64 in which every parameter matters, and a copy of it, adapted."""
    base = randomise(models.build(name, 3)).double()
    model = copy.deepcopy(base)
    methods.adapt(model, method, options(**changes))
    return base, model


def numbers(method: str, base: nn.Module) -> int:
    """How many numbers a method trains, by formula. Every linked layer with a bias has a β."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    count, norms = size(base.head), 0
    for module in base.modules():
        norms += size(module) if isinstance(module, nn.LayerNorm) else 0
    for name, anterior, _ in base.links():
        layer = base.get_submodule(name)
        outputs, read = len(layer.weight), layer.weight[0].numel()  # by one output, all places
        inputs = layer.weight.shape[1] * getattr(layer, "groups", 1)
        scales = outputs if layer.bias is None else 2 * outputs
        count += {
            "norm": 0,
            "lora": OPTIONS.rank * (outputs + read),
            "dora": OPTIONS.rank * (outputs + read) + outputs,
            "ia3": isinstance(layer, nn.Linear) * (inputs if name.endswith(SECOND) else outputs),
            "ssf": scales,
            "hyperadapt": scales + inputs,
            "san": scales,
            "san2": scales + (inputs if anterior else 0),
        }[method]
    return count + (0 if method in ("lora", "dora", "ia3") else norms)


each_model = pytest.mark.parametrize("name", MICRO)
each_method = pytest.mark.parametrize("method", ["norm", "lora", "dora", *SCALING])


@each_model
@each_method
def test_a_vision_model_starts_as_its_base_trains_so_many_numbers_and_folds(name, method):
    base, model = base_and_adapted(name, method)
    images = random_images(32).double()
    expected = base(images)
    assert difference(model(images), expected) < 1e-12
    assert methods.count(model)[0] == numbers(method, base)
    output = train(model)(images)
    assert difference(output, expected) > 0.1
    output.square().sum().backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == trained_names(model)
    again = copy.deepcopy(base)
    methods.adapt(again, method, options())
    again.load_state_dict(methods.trained_state(model), strict=False)
    assert torch.equal(again(images), output)
    methods.fold(model)
    assert structure(model) == structure(base)
    assert difference(model(images), output) < 1e-10


def test_ia3_is_pefts():
    peft = pytest.importorskip("peft", reason="the reference is PEFT's IA³; pip install peft")
    base, images = tiny_vit(), random_images(32)
    model, theirs = copy.deepcopy(base), copy.deepcopy(base)
    linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    config = peft.IA3Config(target_modules=linear, feedforward_modules=["mlp.fc2"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    methods.adapt(model, "ia3", OPTIONS)
    scales = {
        key.rpartition(".")[0]: p
        for key, p in train(model).named_parameters()
        if p.requires_grad and "head" not in key
    }
    their_scales = {key: theirs.get_submodule(key).ia3_l["default"] for key in scales}
    assert len(scales) == 8 == sum("ia3_l" in key for key, _ in theirs.named_parameters())
    with torch.no_grad():
        theirs.head.load_state_dict(model.head.state_dict())
        for key, scale in scales.items():
            their_scales[key].copy_(scale.view_as(their_scales[key]))
    assert difference(model(images), base(images)) > 0.1
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)
    for both in (model, theirs):
        both(images).square().sum().backward()
    for key, scale in scales.items():
        gradient = their_scales[key].grad.view_as(scale)
        torch.testing.assert_close(scale.grad, gradient, atol=1e-4, rtol=1e-4)
    methods.fold(model)
    for key in scales:
        theirs.get_submodule(key).merge()
        for one, other in zip(
            model.get_submodule(key).parameters(),
            theirs.get_submodule(key).get_base_layer().parameters(),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@each_model
@torch.no_grad()
def test_hyperadapt_and_san2_are_san_where_their_own_column_scales_say_what_sans_do(name):
    images = random_images(32).double()
    _, san_model = base_and_adapted(name, "san")
    expected = train(san_model)(images)
    state = methods.trained_state(san_model)
    for method in ("hyperadapt", "san2"):
        base, model = base_and_adapted(name, method)
        assert model.load_state_dict(state, strict=False).unexpected_keys == []
        own = trained_names(model) - state.keys()
        linked = [link.layer for link in base.links() if link.anterior or method == "hyperadapt"]
        assert own == {f"{layer}.layer.a" for layer in linked}
        for layer in linked if method == "hyperadapt" else []:
            anterior_gamma, *_ = san_model.get_submodule(layer).vectors()
            if anterior_gamma is not None:
                model.get_submodule(layer).layer.a.copy_(anterior_gamma)
        assert difference(model(images), expected) < 1e-10
        assert difference(train(model)(images), expected) > 0.1


@each_model
def test_own_column_scales_cost_no_products_beyond_sans(name):
    """But for the gradient by the pixels, which the first layer's own scales take."""

    def products(method: str) -> int:
        _, model = base_and_adapted(name, method)
        with FlopCounterMode(display=False) as counter:
            model(random_images(32).double()).sum().backward()
        return counter.get_total_flops()

    def of_the_first_layer() -> int:
        base, _ = base_and_adapted(name, "san")
        with FlopCounterMode(display=False) as counter:
            base.get_submodule(base.links()[0].layer)(random_images(32).double())
        return counter.get_total_flops()

    assert products("san") == products("san2") < products("full")
    assert products("hyperadapt") == products("san") + of_the_first_layer()


def test_san2_has_no_second_vector_where_nothing_is_propagated():
    _, feature = base_and_adapted("vit_micro", "san2", mode="feature")
    assert not any(isinstance(module, methods.ColumnLayer) for module in feature.modules())


# --------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("method", ["lora", "dora", "hyperadapt", "san", "san+lora"])
def test_training_keeps_state_for_what_is_trained_alone_and_the_rest_in_its_place(method, tmp_path):
    model = llama(torch.bfloat16)
    base = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    methods.adapt(model, method, OPTIONS)
    start = {name: value.clone() for name, value in methods.trained_state(model).items()}
    loader = DataLoader(TensorDataset(random_tokens()), batch_size=2)
    flags = dict(lr=1e-3, weight_decay=0.0, epochs=2, warmup_epochs=0, seed=0)
    args = argparse.Namespace(**flags, amp=False, resume=False, accumulate=1)

    def loss_of(model: nn.Module, batch: list) -> torch.Tensor:
        return model(batch[0]).float().square().mean()

    loop.fit(model, loader, loss_of, lambda _: 0.0, args, tmp_path)

    content = san.read(tmp_path / "checkpoint.pt")
    assert content["model"].keys() == start.keys() == TRAINED[method]
    assert not any(torch.equal(content["model"][name], start[name]) for name in start)
    kept = [v.shape for state in content["optimizer"]["state"].values() for v in state.values()]
    assert sum(shape.numel() for shape in kept if shape) == 2 * methods.count(model)[0]
    for name in base.keys() - TRAINED[method]:
        parameter, place, value = base[name]
        assert parameter.grad is None and parameter.data_ptr() == place, name
        assert torch.equal(parameter, value), name


STEP = '''
"""A SAN step and its merge on a bfloat16 LLaMA: MB of its weights, and by how much memory grew."""
import argparse
from pathlib import Path

import torch

import models
from lab import methods

options = argparse.Namespace(
    wiring="san", mode="both", shift=False, rank=4, alpha=None, norms=True, gamma_std=0.0
)
models.initialise = lambda *_, **__: None  # torch's own values do, and come sooner


def resident(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[0]) / 1e3


def step(dim, depth, hidden):
    torch.set_default_dtype(torch.bfloat16)
    model = models.LLaMA(512, dim, depth, heads=8, kv_heads=4, hidden=hidden, context=32)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.float()
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    methods.adapt(model, "san", options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(8)[None]).float().square().mean().backward()
    optimizer.step()
    methods.fold(model)
    return weights


step(64, 1, 96)  # what torch loads at its first step is not the model's
before = resident("VmRSS:")
print(step(768, 9, 2304), resident("VmHWM:") - before)
'''


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_step_and_a_merge_take_hardly_more_memory_than_the_bfloat16_weights():
    # glibc gives what is larger back when it is freed; what it keeps would count
    settings = {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    command, env = [sys.executable, "-c", STEP], os.environ | settings
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, growth = map(float, done.stdout.split())
    assert weights > 120
    allowance = 10  # MB: activations of 8 tokens, a layer folded in float32; a copy is 129
    assert weights * 0.9 < growth < 1.3 * weights + allowance
