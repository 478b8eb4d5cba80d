"""What san.py promises, each promise a test named after it; γ' is the anterior layer's γ."""

import ast
import copy
import io
import pickle
import resource
import subprocess
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
import san
from san import Link, SANLayer, attach, detach, disabled, load_adapter, merge, save_adapter

MODES = {"both": {}, "feature": {"propagate": False}, "propagation": {"scale": False}}
LINKS, TRAINABLE = [Link("fc1"), Link("fc2", "fc1")], ["norm", "head"]
each_setting = pytest.mark.parametrize(
    "mode, shift", [(mode, shift) for mode in MODES for shift in (False, True)]
)
each_precision = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)
each_case = pytest.mark.parametrize("name", ["cnn", "vit_micro", "convnext_micro"])
each_layer = pytest.mark.parametrize(
    "kind", ["linear", "groups 1", "groups 2", "depthwise", "depthwise ×2"]
)


def randomised(model, dtype=torch.float32):
    """Weights large enough for every layer to matter, biases and norms included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def mlp(dtype=torch.float64, first="fc1", classes=3):
    """fc1, GELU, norm, fc2, head; the same values at every call."""
    torch.manual_seed(0)
    layers = {first: nn.Linear(6, 8), "act": nn.GELU(), "norm": nn.LayerNorm(8)}
    layers |= {"fc2": nn.Linear(8, 8), "head": nn.Linear(8, classes)}
    return randomised(nn.Sequential(OrderedDict(layers)), dtype)


def trained(model, seed=1):
    """Stands for training: all that is trainable moves, and γ takes on 0 and negative values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
                if name.endswith("gamma"):
                    parameter[:2] = torch.tensor([0.0, -1.2])
    return model


def adapted_mlp(dtype=torch.float64, **settings):
    model = mlp(dtype)
    attach(model, LINKS, **{"trainable": TRAINABLE, **settings})
    return trained(model)


def case(name):
    """(a base model, its links, what else to train, an input)"""
    torch.manual_seed(0)
    if name != "cnn":
        model = randomised(models.build(name, 5))
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        return model, model.links(), [*norms, "head"], torch.randn(2, 3, 32, 32)
    layers = dict(conv1=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), conv2=nn.Conv2d(8, 4, 3))
    layers |= dict(flatten=nn.Flatten(), fc=nn.Linear(16, 6), head=nn.Linear(6, 3))
    flat = torch.arange(4).repeat_interleave(4)  # each channel becomes 2×2 inputs of fc
    links = [Link("conv1"), Link("conv2", "conv1"), Link("fc", "conv2", flat)]
    return randomised(nn.Sequential(OrderedDict(layers))), links, TRAINABLE, torch.randn(2, 3, 6, 6)


def adapted_layer(kind, mode="both", shift=True, dtype=torch.float64):
    """(a model, its trained SAN layer of that kind, an input); the index permutes and repeats."""
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(8, 6),
        "groups 1": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
        "groups 2": lambda: nn.Conv2d(8, 6, 3, (1, 2), (2, 0), dilation=2, groups=2),
        "depthwise": lambda: nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False),
        "depthwise ×2": lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1, padding_mode="reflect"),
    }[kind]()
    x = torch.randn(2, 5, 8) if kind == "linear" else torch.randn(2, 8, 7, 9)
    model = nn.ModuleDict(dict(before=nn.Linear(3, 5), layer=layer)).to(dtype)
    links = [Link("before"), Link("layer", "before", [4, 0, 0, 3, 1, 2, 2, 4])]
    attach(model, links, **MODES[mode], shift=shift)
    return trained(model), model["layer"], x.to(dtype)


def difference(a, b):
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@contextmanager
def unchanged(model):
    """At the end the model is as it was: the same modules and flags, values equal to the bit."""

    def look():
        flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
        return list(model.named_modules()), flags, hasattr(model, "_san"), list(model.state_dict())

    before, values = look(), copy.deepcopy(model.state_dict())
    yield
    assert look() == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------ attach and the layer


@each_case
@each_setting
def test_at_attach_the_output_is_exactly_the_base_output(name, mode, shift):
    model, links, trainable, x = case(name)
    base = model(x)
    attach(model, links, **MODES[mode], shift=shift, trainable=trainable)
    assert (model(x) - base).abs().max() == 0
    assert all(isinstance(model.get_submodule(link.layer), SANLayer) for link in links)
    assert difference(trained(model)(x), base) > 1e-3  # training does change it


def test_only_gamma_beta_and_what_the_caller_names_are_trained():
    model = adapted_mlp(shift=True, trainable=["norm", "head.bias"])
    model(torch.randn(2, 6).double()).sum().backward()
    expected = ["fc1.gamma", "fc1.beta", "norm.weight", "norm.bias", "fc2.gamma", "fc2.beta"]
    assert trainable_names(model) == [*expected, "head.bias"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == trainable_names(model)


def test_propagation_alone_trains_only_a_gamma_that_some_layer_reads():
    assert trainable_names(adapted_mlp(scale=False, trainable=[])) == ["fc1.gamma"]


def test_a_layer_without_bias_gets_no_shift():
    assert "layer.beta" not in trainable_names(adapted_layer("depthwise", shift=True)[0])


def test_a_trainable_part_whose_weight_is_tied_to_another_is_trained():
    model = nn.Sequential(OrderedDict(words=nn.Embedding(9, 8), fc=nn.Linear(8, 8)))
    model.add_module("head", nn.Linear(8, 9, bias=False))
    model.head.weight = model.words.weight
    base = model.words.weight.detach().clone()
    attach(model, [Link("fc")], trainable=["head"])
    assert model.head.weight.requires_grad
    moved = trained(model).words.weight.detach().clone()
    with disabled(model):
        assert torch.equal(model.words.weight, base)
    assert torch.equal(model.words.weight, moved)
    detach(model)
    assert torch.equal(model.words.weight, base)


@each_setting
def test_the_modes_compute_their_formulas(mode, shift):
    """y = γ ⊙ ((W diag γ') x + b) + β; "feature" leaves γ' out: SSF; "propagation" the outer γ."""
    model, x = adapted_mlp(**MODES[mode], shift=shift), torch.randn(5, 6).double()
    p = dict(model.named_parameters())
    assert ("fc1.beta" in p) == shift
    ones, zeros = torch.ones(8).double(), torch.zeros(8)
    gamma1, gamma2 = (ones, ones) if mode == "propagation" else (p["fc1.gamma"], p["fc2.gamma"])
    columns = torch.diag(ones if mode == "feature" else p["fc1.gamma"])
    z = gamma1 * (x @ p["fc1.layer.weight"].T + p["fc1.layer.bias"]) + p.get("fc1.beta", zeros)
    weight = p["fc2.layer.weight"] @ columns
    z = gamma2 * (model.norm(model.act(z)) @ weight.T + p["fc2.layer.bias"])
    assert difference(model(x), model.head(z + p.get("fc2.beta", zeros))) < 1e-12


@each_layer
@each_setting
def test_the_cheap_form_equals_the_explicit_weight_form_and_so_do_its_gradients(kind, mode, shift):
    model, layer, x = adapted_layer(kind, mode, shift)
    inputs = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    outputs = layer(x), layer.forward_explicit(x)
    assert difference(*outputs) < 1e-12
    cheap, explicit = (
        torch.autograd.grad(y.sin().sum(), inputs, materialize_grads=True) for y in outputs
    )
    for one, other in zip(cheap, explicit):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    by_gamma = dict(zip(inputs, explicit))[model["before"].gamma]
    assert (by_gamma.abs().max() > 0) == (mode != "feature")  # γ' is reached, unless left out


def test_gamma_is_one_parameter_and_its_gradient_is_the_sum_of_its_two_uses():
    model, x = adapted_mlp(), torch.randn(5, 6).double()
    gamma = model.fc1.gamma
    assert model.fc2.vectors()[0] is gamma
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is gamma]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    assert names == ["fc1.gamma"]
    assert sum(p is gamma for p in optimiser.param_groups[0]["params"]) == 1

    feature, propagated = (gamma.detach().clone().requires_grad_() for _ in range(2))
    hidden = model.norm(model.act(feature * model.fc1.layer(x)))
    output = model.head(model.fc2.gamma * model.fc2.layer(propagated * hidden))
    one, other = torch.autograd.grad(output.square().sum(), [feature, propagated])
    (total,) = torch.autograd.grad(model(x).square().sum(), [gamma])
    assert one.abs().min() > 0 and other.abs().min() > 0
    assert difference(total, one + other) < 1e-12


def test_the_value_third_propagates_exactly_through_attention():
    """A (γ_v ⊙ v) = γ_v ⊙ (A v), so the two uses of γ_v multiply what attention mixed by γ_v²."""
    vit = models.build("vit_micro", 5)
    index = next(link.index for link in vit.links() if link.layer == "blocks.0.attn.proj")
    attention, x = randomised(vit.blocks[0].attn, torch.float64), torch.randn(2, 7, 96).double()
    q, k, v = (t.unflatten(-1, (3, 32)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    mixed = ((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    attach(attention, [Link("qkv"), Link("proj", "qkv", index)])
    values = torch.linspace(-1, 2, 96).double()
    attention.qkv.gamma.data[-96:] = values
    assert difference(attention(x), attention.proj.layer(values**2 * mixed)) < 1e-12


def test_a_repeating_index_propagates_exactly_through_a_flatten():
    model, links, _, x = case("cnn")
    z, values = model.double()[:3](x.double()), torch.tensor([0.5, -1, 2, 0]).double()
    attach(model, links)
    model.conv2.gamma.data[:] = values
    expected = model.fc.layer((values[:, None, None] ** 2 * z).flatten(1))
    assert difference(model[:5](x.double()), expected) < 1e-12


# --------------------------------------------------------------------------------------- merge


@pytest.mark.filterwarnings("ignore:the model ran without its linked layers before")
@each_layer
@each_setting
@each_precision
def test_a_merged_layer_keeps_its_output_and_class(kind, mode, shift, dtype, tolerance):
    """γ and γ' hold a zero and a negative value here, see `trained`."""
    model, layer, x = adapted_layer(kind, mode, shift, dtype)
    before = layer(x)
    merge(model)
    assert type(model["layer"]) is (nn.Linear if kind == "linear" else nn.Conv2d)
    assert difference(model["layer"](x), before) <= tolerance


@each_case
@each_precision
def test_a_merged_model_is_the_adapted_one_in_the_base_models_structure(name, dtype, tolerance):
    def structure():
        shapes = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
        return [(n, type(m)) for n, m in model.named_modules()], shapes, trainable_names(model)

    model, links, trainable, x = case(name)
    model, x = model.to(dtype), x.to(dtype)
    base, count = structure(), sum(p.numel() for p in model.parameters())
    attach(model, links, shift=True, trainable=trainable)
    before = trained(model)(x)
    merge(model)
    assert difference(model(x), before) <= tolerance
    assert structure() == base and sum(p.numel() for p in model.parameters()) == count


@each_layer
def test_in_bfloat16_merging_rounds_the_exact_product_once(kind):
    model, san_layer, _ = adapted_layer(kind, dtype=torch.bfloat16)
    layer, gamma, beta = san_layer.layer, san_layer.gamma, san_layer.beta
    groups = getattr(layer, "groups", 1)
    columns = san_layer.vectors()[0].view(groups, -1)  # of each group's rows
    columns = columns.repeat_interleave(len(layer.weight) // groups, 0)

    def product(dtype):
        rows, weight = gamma.to(dtype), layer.weight.to(dtype)
        weight = torch.einsum("oi...,oi->oi...", weight, columns.to(dtype))
        return torch.einsum("oi...,o->oi...", weight, rows)

    exact, folded = product(torch.float64), product(torch.float32).bfloat16()
    bias = None if layer.bias is None else (layer.bias.float() * gamma + beta).bfloat16()
    merge(model)
    weight = model["layer"].weight
    assert torch.equal(weight, folded) and weight.dtype == torch.bfloat16
    assert ((weight - exact).abs() <= (exact.bfloat16() - exact).abs() * (1 + 1e-6)).all()
    assert bias is None or torch.equal(model["layer"].bias, bias)


def enter_disabled(model):
    with disabled(model):
        pass


@pytest.mark.parametrize(
    "use", [merge, detach, enter_disabled, san.summary, lambda model: save_adapter(model, "none")]
)
@pytest.mark.parametrize("end", [None, merge, detach])
def test_a_model_without_san_layers_or_merged_before_is_an_error_that_says_so(use, end):
    model = adapted_mlp() if end else mlp()
    if end:
        end(model)
    with unchanged(model), pytest.raises(ValueError, match="no SAN layers .*merged"):
        use(model)


# ------------------------------------------------------------------- detach, disabled, deepcopy


@each_case
def test_detach_gives_the_base_model_back_bit_for_bit(name):
    model, links, trainable, x = case(name)
    next(model.parameters()).requires_grad_(False)
    base = model(x)
    with unchanged(model):
        attach(model, links, shift=True, trainable=trainable)
        model.train()(x).sum().backward()  # BatchNorm's running figures move too
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        assert not torch.equal(model.eval()(x), base)
        detach(model)
    assert torch.equal(model(x), base)


@each_case
def test_disabled_gives_the_base_output_inside_and_the_adapted_one_after(name):
    model, links, trainable, x = case(name)
    base = model(x)
    attach(model, links, shift=True, trainable=trainable)
    adapted = trained(model)(x)
    with unchanged(model), pytest.raises(KeyError), disabled(model):
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)  # still, when the inner one ends
        raise KeyError
    assert torch.equal(model(x), adapted)


def test_a_loss_may_compare_the_adapted_with_the_disabled_output():
    model, x = adapted_mlp(), torch.randn(2, 6).double()
    inputs = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((model(x) - mlp()(x).detach()).square().sum(), inputs)
    adapted = model(x)
    with disabled(model), torch.no_grad():
        base = model(x)
    gradients = torch.autograd.grad((adapted - base).square().sum(), inputs)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("side", ["inside", "outside", "a step later", "after detach"])
def test_a_backward_pass_on_the_other_side_of_its_forward_is_refused(side):
    """Its values are not there any more, and torch knows."""
    model, x = adapted_mlp(), torch.randn(2, 6).double().requires_grad_()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sum().backward()
    output = model(x)
    if side == "after detach":
        detach(model)
    else:
        with disabled(model):
            if side == "inside":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    output.sum().backward()
            output = model(x)
            torch.autograd.grad(output.sum(), x, retain_graph=True)  # on its own side it runs
    if side == "a step later":
        optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Growing(nn.Module):
    """fc of all that it has read, which it keeps in a buffer."""

    def __init__(self, first):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.register_buffer("read", first)

    def forward(self, x):
        x = x.detach() if self.read is None else torch.cat([self.read, x.detach()])
        self.register_buffer("read", x)
        return self.fc(x)


@pytest.mark.parametrize("first", [None, torch.zeros(0, 6), torch.ones(2, 6)])
@pytest.mark.parametrize("then", ["grown", "grown in inference", "None"])
def test_a_buffer_that_a_forward_replaces_comes_back_as_it_was(first, then):
    def same(one, other):
        return one is other is None or torch.equal(one, other)

    model, x = Growing(first), torch.randn(3, 6)
    base = model(x).detach()
    model.read = first
    attach(model, [Link("fc")])
    with torch.inference_mode(then == "grown in inference"):
        trained(model)(x)
    model.read = None if then == "None" else model.read
    read = model.read
    for _ in range(2):
        with disabled(model):
            assert same(model.read, first) and torch.equal(model(x), base)
        assert same(model.read, read)
    detach(model)
    assert same(model.read, first) and torch.equal(model(x), base)
    assert "read" in model._buffers and len([*model.parameters()]) == 2


def test_a_deep_copy_is_independent_and_shares_gamma_within_itself():
    model, x = adapted_mlp(), torch.randn(2, 6).double()
    with unchanged(model):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert twin.fc2.vectors()[0] is twin.fc1.gamma is not model.fc1.gamma
        moved = trained(twin, seed=2)(x)
        assert difference(moved, model(x)) > 1e-3
        merge(twin)
        assert difference(twin(x), moved) < 1e-12


# --------------------------------------------------------------------------------------- files


@each_case
@pytest.mark.parametrize("mode, shift", [("both", True), ("propagation", False)])
def test_a_saved_adapter_is_small_and_gives_the_output_back_bit_for_bit(
    name, mode, shift, tmp_path
):
    (model, links, trainable, x), base = case(name), case(name)[0]
    first, second = tmp_path / "new folder" / "1.pt", tmp_path / "new folder" / "2.pt"
    attach(model, links, **MODES[mode], shift=shift, trainable=trainable)
    save_adapter(trained(model), first)
    load_adapter(base, first)
    assert torch.equal(base(x), model(x)) and trainable_names(base) == trainable_names(model)
    assert all(map(torch.equal, base.state_dict().values(), model.state_dict().values()))
    save_adapter(base, second)  # what was loaded detaches, saves and merges like the first
    detach(base)
    load_adapter(base, second)
    merge(base)
    assert difference(base(x), model(x)) <= 1e-5
    assert sorted(first.parent.iterdir()) == [first, second]
    assert first.stat().st_size < 100_000


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize(
    "to, tolerance",
    [(torch.bfloat16, 0.05), (torch.float64, 1e-5), pytest.param("cuda", 1e-5, marks=no_gpu)],
)
def test_an_adapter_loads_onto_another_dtype_or_device(to, tolerance, tmp_path):
    model, x = adapted_mlp(torch.float32, shift=True), torch.randn(4, 6)
    save_adapter(model, tmp_path / "a.pt")
    other = mlp(torch.float32).to(to)
    load_adapter(other, tmp_path / "a.pt")
    output = other(x.to(to))
    assert (output.dtype, output.device) == (other.head.weight.dtype, other.head.weight.device)
    assert difference(output.to(x), model(x)) < tolerance
    assert torch.equal(other.fc1.gamma.to(x), model.fc1.gamma)  # γ is float32 at least
    assert torch.equal(other.head.weight, model.head.weight.to(to))


def narrower():
    model = mlp()
    model.fc2 = nn.Linear(8, 7)
    return model


def with_another_bias():
    model = mlp()
    nn.init.normal_(model.fc2.bias)
    return model


def merged_already():
    """By γ near 1, as a short training leaves them."""
    model = mlp()
    attach(model, LINKS)
    for layer in (model.fc1, model.fc2):
        nn.init.uniform_(layer.gamma, 0.97, 1.03)
    merge(model)
    return model


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: mlp(first="stem"), r"fc1\.weight \(\[8, 6\] there, missing here\); fc1\.bias"),
        (narrower, r"fc2\.weight \(\[8, 8\] there, \[7, 8\] here\)"),
        (lambda: case("convnext_micro")[0], r"fc1\.weight"),
        (lambda: randomised(mlp()), r"other weights of this architecture: fc1\.weight has"),
        (with_another_bias, r"other weights of this architecture: fc2\.bias has"),
        (merged_already, r"other weights of this architecture: fc1\.weight has .*, unmerged"),
        (adapted_mlp, "already"),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_the_keys_that_differ(other, message, tmp_path):
    save_adapter(adapted_mlp(), tmp_path / "a.pt")
    model = other()
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a.pt")


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
def test_an_adapter_loads_onto_its_base_read_from_a_file_of_half_precision(rounded, tmp_path):
    model, x = adapted_mlp(torch.float32, shift=True), torch.randn(4, 6)
    save_adapter(model, tmp_path / "a.pt")
    other = mlp(torch.float32).to(rounded).float()
    load_adapter(other, tmp_path / "a.pt")
    assert difference(other(x), model(x)) < 0.05


def test_what_is_given_other_values_after_attach_is_saved_and_not_detached(tmp_path):
    model, x = mlp(), torch.randn(2, 6).double()
    attach(model, LINKS)
    model.head.load_state_dict(randomised(nn.Linear(8, 3), torch.float64).state_dict())
    with pytest.raises(ValueError, match="'head.weight' was given other values after attach"):
        detach(model)
    with pytest.raises(ValueError, match="'head.weight' was given"), disabled(model):
        pass
    save_adapter(model, tmp_path / "a.pt")
    other = mlp()
    load_adapter(other, tmp_path / "a.pt")
    assert torch.equal(other(x), model(x))
    nn.init.zeros_(model.fc1.layer.weight)
    with pytest.raises(ValueError, match="'fc1.layer.weight' has other values than at attach"):
        save_adapter(model, tmp_path / "b.pt")


def test_a_new_head_of_another_size_is_loaded_and_detached(tmp_path):
    model, x = mlp(), torch.randn(2, 6).double()
    attach(model, LINKS, shift=True, trainable=["norm"])
    model.head = nn.Linear(8, 7).double()  # put in after attach, and named nowhere
    save_adapter(trained(model), tmp_path / "a.pt")
    other = mlp()
    with unchanged(other):
        load_adapter(other, tmp_path / "a.pt")
        assert torch.equal(other(x), model(x)) and other.head.out_features == 7
        weight = other.head.weight
        with disabled(other):
            assert torch.equal(other(x), mlp()(x)) and other.head.out_features == 3
        assert other.head.weight is weight  # an optimizer holds it
        assert torch.equal(other(x), model(x)) and other.head.out_features == 7
        detach(other)
    assert other.head.out_features == 3


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.to("meta"), "'fc1.weight' is on the meta device.*load the model"),
        (lambda model: setattr(model.fc1, "__class__", Squared), "a Squared, does not compute"),
    ],
)
def test_a_file_is_not_blamed_for_what_the_model_is(change, message, tmp_path):
    save_adapter(adapted_mlp(), tmp_path / "a.pt")
    model = mlp()
    change(model)
    with pytest.raises(ValueError, match=f"a.pt cannot be loaded onto this model: .*{message}"):
        load_adapter(model, tmp_path / "a.pt")
    assert not hasattr(model, "_san")


class Malicious:
    """Unpickled without care, it creates a file called `executed`."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def torch_bytes(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        torch_bytes({"san": 1, "base": Malicious()}),
        pickle.dumps(Malicious(), protocol=2),
        torch_bytes(mlp().state_dict()),
        torch_bytes({"san": 1}),
        torch_bytes(mlp().state_dict())[:1000],
        torch_bytes(mlp().state_dict(), _use_new_zipfile_serialization=False)[:-7],
        b"plain text",
        b"K\x01a",  # a pickle that takes from an empty stack
        b"",
        None,
    ],
    ids=["code", "pickled code", "state dict", "incomplete", "truncated", "truncated old format"]
    + ["text", "broken pickle", "empty", "missing"],
)
def test_a_bad_file_is_refused_by_name_and_never_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path = mlp(), tmp_path / "bad.pt"
    if content is not None:
        path.write_bytes(content)
    refusal = FileNotFoundError if content is None else (OSError, ValueError)
    with unchanged(model), pytest.raises(refusal, match=str(path)) as caught:
        load_adapter(model, path)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_the_malicious_file_is_dangerous_indeed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))
    assert Path("executed").exists()


@contextmanager
def full_disk():
    """No file may grow beyond a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_former_file_and_nothing_half_written(tmp_path):
    path, model = tmp_path / "a.pt", adapted_mlp()
    save_adapter(model, path)
    before = path.read_bytes()
    for target in (path, tmp_path / "new.pt"):
        with full_disk(), pytest.raises(OSError, match=f"could not write {target}"):
            save_adapter(trained(model), target)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize("target", ["file/a.pt", "folder"])
def test_a_path_that_cannot_be_written_is_an_error_that_names_it(target, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"could not write {tmp_path / target}"):
        save_adapter(adapted_mlp(), tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# --------------------------------------------------------------------- summary, errors, one file


def test_summary_counts_parameters_and_potentiated_and_depressed_channels():
    model = mlp()
    base = sum(p.numel() for p in model.parameters())
    attach(model, LINKS, trainable=TRAINABLE)
    model.fc1.gamma.data[:4] = torch.tensor([2, 0.5, -1, 1.5])
    trainable = (8 + 8) + (8 + 8) + (8 * 3 + 3)  # γ, norm, head
    assert san.summary(model) == {
        "trainable": trainable,
        "total": base + 16,
        "percent": pytest.approx(100 * trainable / (base + 16)),
        "layers": {
            "fc1": {"potentiated": 2 / 8, "depressed": 2 / 8, "min": -1, "max": 2},
            "fc2": {"potentiated": 0, "depressed": 0, "min": 1, "max": 1},
        },
    }


def zoo():
    """A layer for every error: `twin` has the weight of `tied`, `alias` is `tied` itself."""
    layers = dict(fc1=nn.Linear(6, 8), norm=nn.LayerNorm(8), fc2=nn.Linear(8, 8))
    layers |= dict(back=nn.ConvTranspose1d(8, 8, 1), tied=nn.Linear(8, 8), twin=nn.Linear(8, 8))
    model = nn.Sequential(OrderedDict(layers))
    model.add_module("words", nn.Embedding(5, 8))
    model.add_module("act", nn.GELU())
    model.add_module("deep", nn.ModuleDict({"fc": nn.Linear(4, 4)}))
    model.add_module("alias", model.tied)
    model.add_module("complex", nn.Linear(8, 8, dtype=torch.complex64))
    model.twin.weight = model.tied.weight
    model.fc2.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "link, settings, error, message",
    [
        (Link("fc3"), {}, ValueError, "no layer 'fc3'; the closest names are .*fc2"),
        (Link("fc1"), {}, ValueError, "'fc1' is linked twice"),
        (Link("fc2", "norm"), {}, ValueError, "'norm' of layer 'fc2' is not adapted"),
        (Link("fc2", "fc"), {}, ValueError, "not adapted.*closest names are .*fc1"),
        (Link("fc2", None, range(8)), {}, ValueError, "index but no anterior; name one"),
        (Link("fc2", "fc1", range(5)), {}, ValueError, "reads 8 channels but the index has 5"),
        (Link("deep.fc", "fc1"), {}, ValueError, "reads 4 channels but 'fc1' has 8"),
        (Link("fc2", "fc1", range(1, 9)), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", range(-1, 7)), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", [0.5] * 8), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", [True] * 8), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", np.arange(8.0)), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", torch.zeros(8, 2)), {}, ValueError, "whole numbers from 0 to 7"),
        (Link("fc2", "fc1", slice(4)), {}, ValueError, "reads 8 channels but the index has 4"),
        (Link("fc2", "fc1", 3), {}, ValueError, "reads 8 channels but the index has 1"),
        (Link("norm"), {}, TypeError, "'norm' is a LayerNorm; SAN adapts Linear, Conv1d"),
        (Link("back"), {}, TypeError, "'back' is a ConvTranspose1d"),
        (Link("words"), {}, TypeError, "'words' is a Embedding"),
        (
            Link("complex"),
            {},
            TypeError,
            "'complex' is complex, torch.complex64; load it in float32",
        ),
        (
            Link("tied"),
            {},
            ValueError,
            "'tied.weight' and 'twin.weight' .*tied.*; copy or drop one",
        ),
        (Link("twin"), {}, ValueError, "'tied.weight' and 'twin.weight' .*tied"),
        (Link("alias"), {}, ValueError, "'alias.*tied"),
        (None, {}, ValueError, "no link"),
        (Link("fc2"), {"scale": False, "propagate": False}, ValueError, "γ would act nowhere"),
        (Link("fc2"), {"scale": False}, ValueError, "γ would act nowhere; leave scale on, or"),
        (Link("fc2"), {"trainable": ["nrm"]}, ValueError, "'nrm'; the closest names are .*norm"),
        (Link("fc2"), {"trainable": ["act"]}, ValueError, "'act' has no parameters to train"),
        (Link("fc2"), {"trainable": [""]}, ValueError, "nothing to train is called ''$"),
        (Link(""), {}, ValueError, "a link names no layer"),
        (Link("fc2"), {"trainable": ["norm", "fc2"]}, ValueError, "'fc2.weight' .*linked layer"),
    ],
)
def test_what_attach_cannot_do_it_says_and_leaves_the_model_as_it_was(
    link, settings, error, message
):
    model = zoo()
    with unchanged(model), pytest.raises(error, match=message) as caught:
        attach(model, [Link("fc1"), link] if link else [], **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "links, trainable, message",
    [
        (["fc1"], [], r"a str is no link; write Link\(layer"),
        ("fc1", [], "a str is no link"),
        (lambda: LINKS, [], "a function is no link"),
        ([Link(nn.Linear(6, 8))], [], "a Linear is no name; give its name, as"),
        ([Link("fc2", nn.Linear(6, 8))], [], "a Linear is no name"),
        (LINKS, [nn.Linear(6, 8)], "a Linear is no name"),
        (LINKS, nn.Linear(6, 8), "a Linear is no name"),
        (LINKS, None, "a NoneType is no name"),
    ],
)
def test_what_stands_for_a_link_or_a_name_and_is_none_is_refused(links, trainable, message):
    model = mlp()
    with unchanged(model), pytest.raises(TypeError, match=message):
        attach(model, links, trainable=trainable)


@pytest.mark.parametrize(
    "index",
    [slice(2, 5), np.arange(2, 5), torch.arange(2, 5), [np.int64(2), torch.tensor(3), 4]],
    ids=["slice", "numpy", "torch", "mixed"],
)
def test_an_index_may_be_a_slice_and_hold_the_numbers_of_numpy_and_torch(index):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(3, 2))
    attach(model, [Link("0"), Link("1", "0", index)])
    assert model[1].index.tolist() == [2, 3, 4]


def test_a_link_or_a_name_may_stand_alone():
    model = mlp()
    attach(model, Link("fc1"), trainable="norm")
    assert trainable_names(model) == ["fc1.gamma", "norm.weight", "norm.bias"]


def test_of_a_model_with_a_part_that_was_adapted_the_part_is_named():
    model = nn.ModuleDict({"body": mlp()})
    attach(model["body"], LINKS)
    with unchanged(model), pytest.raises(ValueError, match="'body' of this model has .* already"):
        attach(model, [Link("body.head")])
    with unchanged(model), pytest.raises(ValueError, match="'body' of this model has the SAN"):
        merge(model)
    detach(model["body"])
    attach(model, [Link("body.fc1")])
    with unchanged(model), pytest.raises(ValueError, match="this is a part of has .* already"):
        attach(model["body"], LINKS)
    with unchanged(model), pytest.raises(ValueError, match="this is a part of has the SAN"):
        merge(model["body"])


def test_attaching_twice_is_refused_and_keeps_the_first():
    model = adapted_mlp()
    with unchanged(model), pytest.raises(ValueError, match="already; merge or detach it first"):
        attach(model, LINKS)


def test_a_parametrized_weight_in_half_precision_is_not_trained():
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
    model = nn.Sequential(OrderedDict(fc1=nn.Linear(6, 8), head=head)).bfloat16()
    with unchanged(model), pytest.raises(ValueError, match="'head.weight' is parametrized and .*"):
        attach(model, [Link("fc1")], trainable=["head"])


def test_what_trains_in_a_half_precision_model_follows_it_to_a_wider_type():
    model = adapted_mlp(torch.bfloat16)
    model.float()
    trained(model, seed=3)
    before = model(torch.ones(2, 6))
    merge(model)
    assert model.norm.weight.dtype == torch.float32
    assert difference(model(torch.ones(2, 6)), before) < 1e-5


@pytest.mark.parametrize("end", [merge, detach])
def test_the_end_of_a_deep_copy_leaves_the_original_whole_in_half_precision(end):
    model, x = adapted_mlp(torch.bfloat16), torch.ones(2, 6).bfloat16()
    before = model(x)
    end(copy.deepcopy(model))
    assert torch.equal(model(x), before)


def test_a_module_of_the_base_comes_back_in_the_models_mode():
    model = mlp()
    model.head = nn.Sequential(nn.Dropout(), model.head)
    attach(model.train(), LINKS)
    model.head = nn.Sequential(nn.Dropout(), nn.Linear(8, 3).double())
    with disabled(model):
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in model.modules())  # nor those that were away
    detach(model.train())
    assert all(module.training for module in model.modules())


def test_san_is_one_file_that_needs_torch_alone(tmp_path):
    source, imported = Path(san.__file__).read_text(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}
    (tmp_path / "copied_san.py").write_text(source)
    use = f"""import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, copied_san as san
model = torch.nn.Sequential(torch.nn.Linear(3, 2))
san.attach(model, [san.Link("0")]); san.merge(model); print(type(model[0]).__name__)"""
    ran = subprocess.run([sys.executable, "-I", "-c", use], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "Linear\n"), ran.stderr


# ------------------------------------------------------ what propagation adds, as README says


def test_through_gelu_san_reaches_what_feature_scaling_cannot_and_through_relu_it_is_a_square():
    z, gamma = torch.linspace(-3, 3, 200).double(), 1.5
    k = torch.linspace(-9, 9, 2000).double()[:, None]

    def smallest_gap(f):
        return (gamma * f(gamma * z) - f(k * z)).abs().amax(1).min().item()

    assert smallest_gap(nn.functional.gelu) > 0.05
    assert smallest_gap(nn.functional.relu) < 0.02  # the grid's step: k = 2.25 is gamma squared
    torch.testing.assert_close(gamma * torch.relu(gamma * z), torch.relu(gamma**2 * z))


def test_a_trained_norm_can_absorb_what_is_propagated_through_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    other = copy.deepcopy(model)
    attach(model, [Link("0"), Link("2", "0")])
    attach(other, [Link("0"), Link("2", "0")], propagate=False, trainable=["1"])
    gamma = torch.rand(6).double() + 0.5
    for adapted in (model, other):
        adapted[0].gamma.data.copy_(gamma)
    x = torch.randn(8, 5).double()
    assert not torch.allclose(model(x), other(x))
    other[1].weight.data.mul_(gamma)
    other[1].bias.data.mul_(gamma)
    torch.testing.assert_close(model(x), other(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(3, 4), (3,)), (nn.Linear(3, 4), (2, 5, 3)), (nn.Conv2d(3, 4, 2), (2, 3, 4, 4))],
)
def test_the_gradients_agree_with_finite_differences(layer, shape, shift):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer), nn.GELU(), type(layer)(*SECOND[type(layer)]))
    model.double()
    attach(model, [Link("0"), Link("2", "0", [3, 1, 2, 0])], shift=shift)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def output(x, *values):
        changed = dict(zip(parameters, values))
        return torch.func.functional_call(model, changed, x)

    values = [torch.randn_like(p).requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(output, (x, *values))


SECOND = {nn.Linear: (4, 2), nn.Conv2d: (4, 2, 1)}  # arguments of a second layer of each class


def test_a_link_to_a_layer_that_runs_later_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    attach(model, [Link("0", "2"), Link("2")])
    with pytest.warns(UserWarning, match="0 ran before the anterior that its link names"):
        model(torch.randn(2, 4))
    detach(model)
    attach(model, [Link("0"), Link("2", "0")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[2].weight  # read before its anterior has run: nothing has gone wrong
        model(torch.randn(2, 4))


class Bypassing(nn.Module):
    """Calls its first layer by another handle than the one that is adapted."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.own = [self.a]

    def forward(self, x):
        return self.b(self.own[0](x))


def test_a_layer_that_is_called_past_its_san_layer_is_warned_of_alone():
    model = Bypassing()
    attach(model, [Link("a"), Link("b", "a")])
    with pytest.warns(UserWarning) as told:
        model(torch.randn(2, 4))
    assert ["ran without its linked layers a: " in str(one.message) for one in told] == [True]


def test_a_model_that_was_called_in_parts_alone_is_looked_at_before_the_merge():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    attach(model, [Link("0", "2"), Link("2")])
    model[2](model[0](torch.randn(2, 4)))
    with pytest.warns(UserWarning, match="0 ran before the anterior that its link names"):
        merge(model)


def test_a_layer_takes_its_input_by_name_as_before():
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    before = model.fc1(input=x)
    attach(model, LINKS)
    torch.testing.assert_close(model.fc1(input=x), before)


def test_what_is_tied_is_saved_once(tmp_path):
    model = nn.Sequential(OrderedDict(fc1=nn.Linear(6, 8), a=nn.Linear(8, 9), b=nn.Linear(8, 9)))
    model.b.weight = model.a.weight
    base = copy.deepcopy(model)
    attach(model, [Link("fc1")], trainable=["a"])
    with torch.no_grad():
        model.a.weight.add_(1)
    save_adapter(model, tmp_path / "adapter.pt")
    values = san.read(tmp_path / "adapter.pt")["values"]
    assert values["a.weight"].data_ptr() == values["b.weight"].data_ptr()
    load_adapter(base, tmp_path / "adapter.pt")
    assert base.a.weight is base.b.weight and torch.equal(base.a.weight, model.a.weight)


@pytest.mark.parametrize("training", [True, False])
def test_a_batchnorm_in_training_leaves_propagation_alone(training):
    """Its statistics follow γ and β, so that it gives out the same, but for its ε."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*layers).double().train(training)
    attach(model, [Link("0"), Link("3", "0")], shift=True)
    x = torch.randn(16, 3, 9, 9, dtype=torch.float64)
    before = {n: model[:n](x) for n in (3, 4)}
    with torch.no_grad():
        model[0].gamma.add_(torch.rand(8))
        model[0].beta.add_(torch.rand(8))
    after = {n: model[:n](x) for n in (3, 4)}
    assert torch.allclose(before[3], after[3], atol=1e-3) == training
    assert not torch.allclose(before[4], after[4], atol=1e-1)


@pytest.mark.parametrize("end", [merge, lambda model: save_adapter(model, "adapter.pt")])
def test_gamma_that_became_half_precision_after_a_forward_is_said_in_the_end(
    end, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = mlp()
    attach(model, LINKS)
    model(torch.randn(3, 6, dtype=torch.float64))
    with pytest.warns(UserWarning, match="γ has become torch.float16"):
        end(model.half())
