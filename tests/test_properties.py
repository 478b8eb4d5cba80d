"""san.py on 500 random small networks: each of its promises holds on each of them.

A network is drawn as a `Plan`, a few words and numbers that shrink to the simplest network that
still fails, and then built, together with its links.
"""

import copy
from contextlib import contextmanager
from math import gcd, prod
from typing import NamedTuple

import pytest
import torch
from tiny import randomise
from torch import Tensor, nn
from torch.func import functional_call

from san import Link, SANLayer, attach, detach, disabled, load_adapter, merge, save_adapter

hypothesis = pytest.importorskip("hypothesis", reason="it draws networks; pip install hypothesis")
st = hypothesis.strategies

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:the model ran without"),  # every linked layer takes part
]


def examples(count: int) -> hypothesis.settings:
    """The same networks on every run, however slow the machine."""
    return hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},  # which takes minutes
    )


# ---------------------------------------------------------------------------- a random network


class BlockPlan(NamedTuple):
    route: str = "straight"
    layer: str = "linear"
    outputs: int = 2
    bias: bool = True
    norm: str = "none"
    activation: str = "identity"
    use: str = "once"
    residual: bool = False
    linked: bool = True
    gamma: float | None = None  # what every second channel's γ becomes, if it is not as trained


class Plan(NamedTuple):
    blocks: list[BlockPlan]
    places: int = 0  # axes of a picture after its channels
    dtype: torch.dtype = torch.float64
    mode: str = "both"
    shift: bool = False
    norms: str = "frozen"
    head: str = "frozen"
    seed: int = 0


CHANNELS, SIDES, BATCH = 4, (3, 2, 2), 3
MODES = {"both": {}, "feature": {"propagate": False}, "propagation": {"scale": False}}
ACTIVATIONS = dict(identity=nn.Identity, relu=nn.ReLU, gelu=nn.GELU, silu=nn.SiLU)
CONVOLUTIONS = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# the way from one layer's outputs to the next one's inputs: what it makes of B×C×…, and in which
# order, or how often, it brings the numbers of c channels with p places each
ROUTES = {
    "straight": (lambda x: x, lambda c, p: range(c)),
    "slice": (lambda x: x[:, x.shape[1] // 2 :], lambda c, p: range(c // 2, c)),
    "gaps": (lambda x: x[:, ::2], lambda c, p: range(0, c, 2)),
    "repeat": (lambda x: x.repeat_interleave(2, 1), lambda c, p: [i // 2 for i in range(2 * c)]),
    "tile": (lambda x: torch.cat([x, x], 1), lambda c, p: [*range(c), *range(c)]),
    "roll": (lambda x: x.roll(1, 1), lambda c, p: [c - 1, *range(c - 1)]),
    "flatten": (lambda x: x.flatten(1), lambda c, p: [i // p for i in range(c * p)]),
}
# the first of each list is the simplest, what stands there twice comes twice as often
BLOCKS = st.builds(
    BlockPlan,
    route=st.sampled_from([*ROUTES]),
    layer=st.sampled_from(["linear", "convolution", "groups", "groups", "depthwise"]),
    outputs=st.sampled_from([2, 3, 4, 6]),
    bias=st.sampled_from([True, True, False]),
    norm=st.sampled_from(["none", "batch", "layer", "group"]),
    activation=st.sampled_from([*ACTIVATIONS]),
    use=st.sampled_from(["once", "twice", "beside"]),
    residual=st.booleans(),
    linked=st.sampled_from([True, True, True, False]),
    gamma=st.sampled_from([None, 0.0, -1.5, 1e-4, 1e4]),
)
PLANS = st.builds(
    Plan,
    blocks=st.lists(BLOCKS, min_size=2, max_size=3),
    places=st.sampled_from([0, 1, 1, 2, 2, 3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    mode=st.sampled_from(["both", "both", "feature", "propagation"]),
    shift=st.booleans(),
    norms=st.sampled_from(["frozen", "trained", "weights"]),
    head=st.sampled_from(["frozen", "trained", "new"]),
    seed=st.integers(0, 99),
)


class Block(nn.Module):
    """route → layer (called twice, or beside another one) → norm → activation, + what it read."""

    def __init__(self, plan: BlockPlan, inputs: int, sides: tuple[int, ...]):
        super().__init__()
        self.plan, self.read_sides = plan, sides
        self.route, index = ROUTES[plan.route]
        self.index = [*index(inputs, prod(sides))]
        self.sides = () if plan.route == "flatten" else sides
        self.per_place = plan.layer == "linear" or not self.sides
        inputs, self.outputs = len(self.index), plan.outputs
        if plan.residual or plan.use == "twice":
            self.outputs = inputs
        elif plan.layer == "depthwise" and not self.per_place:
            self.outputs = inputs * (1 + plan.outputs % 2)
        self.layer = self.make_layer(inputs)
        if plan.use == "beside":
            self.beside = self.make_layer(inputs)
        self.norm = {
            "none": nn.Identity,
            "batch": lambda: BATCH_NORMS[len(self.sides)](self.outputs),
            "layer": lambda: nn.LayerNorm(self.outputs),
            "group": lambda: nn.GroupNorm(max(1, gcd(4, self.outputs) // 2), self.outputs),
        }[plan.norm if self.outputs > 1 else "none"]()  # of one number a norm leaves rounding alone
        self.activation = ACTIVATIONS[plan.activation]()

    def make_layer(self, inputs: int) -> nn.Module:
        if self.per_place:
            return nn.Linear(inputs, self.outputs, self.plan.bias)
        groups = dict(convolution=1, groups=gcd(2, inputs, self.outputs), depthwise=inputs)
        options = dict(padding=1, groups=groups[self.plan.layer], bias=self.plan.bias)
        return CONVOLUTIONS[len(self.sides)](inputs, self.outputs, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.route(x)
        y = call(self.layer, x, self.per_place)
        if self.plan.use == "twice":
            y = call(self.layer, self.activation(y), self.per_place)
        elif self.plan.use == "beside":
            y = y + call(self.beside, x, self.per_place)
        y = self.activation(call(self.norm, y, self.plan.norm == "layer"))
        return x + y if self.plan.residual else y


def call(module: nn.Module, x: Tensor, per_place: bool) -> Tensor:
    """Contiguous, since of what is not torch sums in an order that depends on requires_grad."""
    if per_place:
        return module(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    return module(x.contiguous())


class Head(nn.Linear):
    """With dropout, in which the mode shows that the head is in."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=self.training)


class Network(nn.Module):
    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(blocks[-1].outputs, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).unsqueeze(-1).flatten(2).mean(2))


def build(plan: Plan) -> tuple[Network, list[Link]]:
    """The plan's network and its links; the same values at every call."""
    blocks, links, writer = [], [], None  # the last linked layer that wrote what is read
    channels, sides = CHANNELS, SIDES[: plan.places]
    for number, own in enumerate(plan.blocks):
        blocks.append(block := Block(own, channels, sides))
        channels, sides = block.outputs, block.sides
        if own.linked or not any(other.linked for other in plan.blocks):
            index = None if writer is None or own.route == "straight" else block.index
            names = ["layer", "beside"] if own.use == "beside" else ["layer"]
            links += [Link(f"blocks.{number}.{name}", writer, index) for name in names]
            writer = f"blocks.{number}.layer"
        else:
            writer = None
    # else γ would act nowhere, which attach refuses
    hypothesis.assume(plan.mode != "propagation" or any(link.anterior for link in links))
    model = randomise(Network(blocks), plan.seed).to(plan.dtype)
    model.blocks[0].layer.weight.requires_grad_(False)  # a flag that detach has to bring back
    return model, links


def attach_as_planned(model: Network, links: list[Link], plan: Plan) -> None:
    own = {"frozen": (), "trained": ("weight", "bias"), "weights": ("weight",)}[plan.norms]
    names = [f"blocks.{i}.norm.{name}" for i in range(len(plan.blocks)) for name in own]
    trainable = [name for name, _ in model.named_parameters() if name in names]
    trainable += ["head"] if plan.head == "trained" else []
    attach(model, links, **MODES[plan.mode], shift=plan.shift, trainable=trainable)


def drawn_inputs(plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.randn(BATCH, CHANNELS, *SIDES[: plan.places], generator=generator).to(plan.dtype)


@torch.enable_grad()
def train(model: Network, x: Tensor, plan: Plan) -> None:
    """Two steps, in which BatchNorm's statistics move too; then γ takes its extreme values."""
    model.train()
    if plan.head == "new":
        model.head = Head(model.head.in_features, 3, dtype=plan.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        loss = (model(x) - 1).square().mean()
        gradients = torch.autograd.grad(loss, parameters) if parameters else []
        for parameter, gradient in zip(parameters, gradients):
            parameter.data -= 0.1 * gradient / (gradient.abs().max() + 1e-3)
    model.eval()
    for block in model.blocks:
        for name in ("layer", "beside"):
            gamma = getattr(getattr(block, name, None), "gamma", None)
            if gamma is not None and block.plan.gamma is not None:
                gamma.data[::2] = block.plan.gamma


# ------------------------------------------------------------------ the formula, and its rounding


def check_formula(adapted: Network, merged: Network, base: Network, plan: Plan, links: list[Link]):
    """Each linked layer, on what it reads in the adapted model, against the formula in float64."""
    read = []
    for link in links:
        layer = adapted.get_submodule(link.layer)
        layer.register_forward_hook(lambda _, x, y, link=link: read.append((link, x[0], y)))
    adapted(drawn_inputs(plan))
    assert {link.layer for link, *_ in read} == {link.layer for link in links}
    for link, x, y in read:
        found = formula(adapted, base, plan, link, x)
        if found is None:
            hypothesis.event("too large to compare")
            continue
        exact, tolerance = found
        explicit = adapted.get_submodule(link.layer).forward_explicit(x)
        outputs = dict(adapted=y, explicit=explicit, merged=merged.get_submodule(link.layer)(x))
        for name, output in outputs.items():
            assert output.isfinite().all(), f"{link.layer}, {name}"
            excess = ((output.double() - exact).abs() / tolerance).max().item()
            assert excess <= 1, f"{link.layer}, {name}: {excess:.3g} times what rounding may do"


def formula(
    adapted: Network, base: Network, plan: Plan, link: Link, x: Tensor
) -> tuple[Tensor, Tensor] | None:
    """y = γ ⊙ (W (γ' ⊙ x) + b) + β, and how far from it rounding may lead, element by element.

    Here γ' goes the way of the channels, through the block's route, and not by the link's index.

    One rounding changes a number by at most the share u, half the distance from 1 to the next
    number; a sum of n products, in whatever order, is off by at most n u Σ |product|. So rounding
    is measured by the same formula without signs, |γ| (|W| |γ' x| + |b|) + |β|: it grows with γ and
    γ' as the rounding does, and stays large where terms cancel. Sums are computed in float32 at
    least, where each term is rounded n + 5 times at most, and as often again in what we call exact.
    In the model's own type three things are rounded: the layer's input, its output, and that after
    γ; in the weight form the weight in place of the input; in the merged layer weight and output.

    None where a number is too large for the model's type.
    """
    layer, trained = base.get_submodule(link.layer), adapted.get_submodule(link.layer)
    own = {name: parameter.double() for name, parameter in layer.named_parameters()}
    shape = (-1, *[1] * (layer.weight.ndim - 2))
    gamma = anterior_gamma = torch.ones(())
    beta, x = torch.zeros(()), x.double()
    if plan.mode != "propagation":
        gamma = trained.gamma.double().view(shape)
    if plan.shift and layer.bias is not None:
        beta = trained.beta.double().view(shape)
    if plan.mode != "feature" and link.anterior is not None:
        block = base.get_submodule(link.layer.rpartition(".")[0])
        anterior_gamma = adapted.get_submodule(link.anterior).gamma.double()
        routed = anterior_gamma.view(1, -1, *[1] * len(block.read_sides))
        routed = block.route(routed.expand(1, -1, *block.read_sides))
        anterior_gamma = routed.reshape(len(block.index), -1)[:, 0].view(shape)
    read = anterior_gamma * x
    exact = gamma * functional_call(layer, own, read) + beta

    inner = functional_call(layer, {name: v.abs() for name, v in own.items()}, read.abs())
    size = gamma.abs() * inner + beta.abs()
    low, high = torch.finfo(plan.dtype), torch.finfo(torch.promote_types(plan.dtype, torch.float32))
    if not all(v.abs().max() < low.max for v in (x, read, inner, size)):
        return None
    terms = layer.weight[0].numel() + 5
    share = 4 * low.eps / 2 + 2 * terms * high.eps / 2  # 4: the three, and their products
    below = terms * high.tiny * 1e5  # what is lost next to 0, and grows by |γ W| < 1e5 at most
    return exact, share * size + below


def same(one: Tensor, other: Tensor) -> None:
    """Equal to the bit, and so are what is NaN."""
    if not torch.equal(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def structure(model: nn.Module) -> tuple:
    """All of a model but its values."""
    adapted = hasattr(model, "_san")
    hooks = [] if adapted else [m._forward_hooks for m in model.modules() if m._forward_hooks]
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    return adapted, hooks, flags, modules


@contextmanager
def unchanged(model: nn.Module):
    """At the end the model is as it was, to the bit."""
    before, values = structure(model), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert structure(model) == before
    assert list(model.state_dict()) == list(values)
    for key, value in model.state_dict().items():
        same(value, values[key])


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter") / "adapter.pt"


@torch.no_grad()
@examples(360)
@hypothesis.example(plan=Plan([BlockPlan()], dtype=torch.bfloat16, head="new"))
@hypothesis.example(plan=Plan([BlockPlan(norm="layer")], dtype=torch.bfloat16, norms="weights"))
@hypothesis.given(plan=PLANS)
def test_an_adapter_is_exact_from_attach_to_detach(file, plan):
    x, (model, links) = drawn_inputs(plan), build(plan)
    base = copy.deepcopy(model)
    expected = base(x)
    with unchanged(model):
        attach_as_planned(model, links, plan)
        same(model(x), expected)
        train(model, x, plan)
        output, (loaded, _) = model(x), build(plan)

        with unchanged(model):
            save_adapter(model, file)
            load_adapter(loaded, file)
            same(loaded(x), output)

        with unchanged(model), disabled(model):
            same(model(x), expected)
            model.train()(x)  # moves BatchNorm's statistics, but not the adapted model's
            model.eval()
        same(model(x), output)

        merge(loaded)  # each layer is the adapted one up to rounding, all else to the bit
        assert structure(loaded) == structure(base)
        for key, value in loaded.state_dict().items():
            layer, _, name = key.rpartition(".")
            if layer not in {link.layer for link in links}:
                same(value, getattr(model.get_submodule(layer), name))
        if plan.dtype == torch.float64:
            assert output.isfinite().all()
            assert (loaded(x) - output).abs().max() <= 1e-9 * output.abs().max()
        check_formula(model, loaded, base, plan, links)

        detach(model)
    same(model(x), expected)


OPERATIONS = ["train", "disable", "copy", "load", "merge a copy", "widen a copy", "attach anew"]


@torch.no_grad()
@examples(100)
@hypothesis.given(plan=PLANS, operations=st.lists(st.sampled_from(OPERATIONS), max_size=6))
def test_the_order_of_operations_does_not_matter(file, plan, operations):
    x, (model, links) = drawn_inputs(plan), build(plan)
    base, expected = copy.deepcopy(model), model(x)
    attach_as_planned(model, links, plan)
    for operation in operations:
        if operation == "train":
            train(model, x, plan)
        elif operation == "disable":
            with unchanged(model), disabled(model):
                same(model(x), expected)
        elif operation == "copy":
            original, model = model, copy.deepcopy(model)
            same(model(x), original(x))
        elif operation == "load":
            save_adapter(model, file)
            original, (model, _) = model, build(plan)
            load_adapter(model, file)
            same(model(x), original(x))
        elif operation == "merge a copy":
            with unchanged(model):
                output = model(x)
                merge(copy.deepcopy(model))
                same(model(x), output)
        elif operation == "widen a copy":
            wide = copy.deepcopy(model).double()
            merge(wide)
            assert all(parameter.dtype == torch.float64 for parameter in wide.parameters())
            assert wide(x.double()).dtype == torch.float64
        else:
            detach(model)
            attach_as_planned(model, links, plan)
    detach(model)
    assert structure(model) == structure(base)
    same(model(x), expected)


@torch.no_grad()
@examples(40)
@hypothesis.given(PLANS, st.sampled_from([0.3, 0.8]))
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(plan, share):
    """γ = largest^share, so that γ γ' is too large for the type where share is more than a half."""
    model, links = build(plan)
    attach_as_planned(model, links, plan)
    for layer in model.modules():
        if isinstance(layer, SANLayer) and layer.gamma is not None:
            layer.gamma.fill_(torch.finfo(plan.dtype).max ** share)
    twice = plan.mode == "both" and any(link.anterior is not None for link in links)
    if twice and share > 0.5:
        with unchanged(model), pytest.raises(ValueError, match="merged weight .* is not finite"):
            merge(model)
    else:
        merge(model)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
