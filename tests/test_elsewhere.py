"""san.py in other people's models, in parents that read a weight, and beside PEFT's LoRA."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import torchvisions_tiny_convnext, torchvisions_tiny_swin, torchvisions_tiny_vit
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import san
from san import Link, SANLayer, attach, detach, disabled, load_adapter, merge, save_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:the model ran without its linked layers"),
]


def package(name: str):
    return pytest.importorskip(name, reason=f"a test puts SAN into its models; pip install {name}")


# ------------------------------------------------------------------------- models of other people


def chained(model: nn.Module, head: str | None) -> list[Link]:
    """All linear layers and convolutions but the head and tied ones.

    The anterior of each is the last one before it that has as many outputs as it has inputs.
    """
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    links, last = [], {}
    for name, layer in model.named_modules():
        is_conv1d = type(layer).__name__ == "Conv1D"
        if not (isinstance(layer, san._KNOWN) or is_conv1d) or name == head:
            continue
        if owners.count(id(layer.weight)) == 1:
            shape = layer.weight.shape[:2]
            outputs, inputs = reversed(shape) if is_conv1d else shape
            links.append(Link(name, last.get(inputs * getattr(layer, "groups", 1))))
            last[outputs] = name
    return links


def norms(model: nn.Module) -> list[str]:
    own = {name: [*layer.parameters(recurse=False)] for name, layer in model.named_modules()}
    return [n for n, m in model.named_modules() if "Norm" in type(m).__name__ and own[n]]


TEXT = dict(vocab_size=40, bos_token_id=0, eos_token_id=1, pad_token_id=2)
WIDTHS = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2)
PICTURE = WIDTHS | dict(image_size=32, patch_size=8)
GPT2 = TEXT | dict(n_positions=16, n_embd=16, n_layer=2, n_head=2)
T5 = TEXT | dict(d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=1, decoder_start_token_id=0)

# library and kind → (the model, the name of its head, if it has one of its own)
ELSEWHERE = {
    "timm vit": lambda timm: (
        timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5),
        "head",
    ),
    "timm beit": lambda timm: (  # its attention reads the weight of qkv
        timm.models.Beit(32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=5),
        "head",
    ),
    "timm convnext": lambda timm: (timm.create_model("test_convnext", num_classes=5), "head.fc"),
    "timm resnet": lambda timm: (timm.create_model("test_resnet", num_classes=5), "fc"),
    "timm efficientnet": lambda timm: (  # "same": Conv2dSame, as all of its tf_ models have it
        timm.create_model("test_efficientnet", pad_type="same", num_classes=5),
        "classifier",
    ),
    "torchvision resnet": lambda vision: (
        vision.models.ResNet(vision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        "fc",
    ),
    "torchvision convnext": lambda _: (copy.deepcopy(torchvisions_tiny_convnext()), "classifier.2"),
    # attention that reads weights: of qkv and proj; of out_proj, as nn.MultiheadAttention
    "torchvision swin": lambda _: (copy.deepcopy(torchvisions_tiny_swin()), "head"),
    "torchvision vit": lambda _: (copy.deepcopy(torchvisions_tiny_vit()), "heads.head"),
    "transformers llama": lambda hf: (
        hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **WIDTHS, num_key_value_heads=2)),
        "lm_head",
    ),
    "transformers gpt2": lambda hf: (hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), None),  # Conv1D
    # these two read the type of a weight: of wo and of the patch embedding
    "transformers t5": lambda hf: (hf.T5ForConditionalGeneration(hf.T5Config(**T5)), None),
    "transformers clip": lambda hf: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**PICTURE)), None),
    "transformers bert": lambda hf: (
        hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **WIDTHS)),
        "classifier",
    ),
    "transformers vit": lambda hf: (
        hf.ViTForImageClassification(hf.ViTConfig(**PICTURE)),
        "classifier",
    ),
}


def case(name: str) -> tuple[nn.Module, list[Link], list[str], dict[str, Tensor]]:
    """(a model in which everything matters, its links, what else to train, its inputs)"""
    torch.manual_seed(0)
    model, head = ELSEWHERE[name](package(name.split()[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens, inputs = torch.randint(3, 40, (2, 6)), {"pixel_values": torch.rand(4, 3, 32, 32)}
    if hasattr(getattr(model, "config", None), "vocab_size"):
        inputs = {"input_ids": tokens}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens
    trainable = norms(model) + ([head] if head else [])
    return model.eval(), chained(model, head), trainable, inputs


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    named = hasattr(model, "config")
    outputs = model(**inputs) if named else model(*inputs.values())
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def steps(model: nn.Module, loss: Callable[[], Tensor], count: int = 3) -> None:
    """A few of AdamW's steps in train mode, so that BatchNorm's statistics move as well."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(count):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_model_is_adapted_trained_saved_merged_and_given_back(name, tmp_path):
    model, links, trainable, inputs = case(name)
    fresh, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        base = output(model, inputs)
    attach(model, links, shift=True, trainable=trainable)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), base)

    steps(model, lambda: output(model, inputs).square().mean())
    gammas = [model.get_submodule(link.layer).gamma for link in links]
    assert len(links) > 5 and all(gamma.grad.abs().max() > 0 for gamma in gammas)
    with torch.no_grad():
        trained = output(model, inputs)
        assert (trained - base).abs().max() > 1e-2
        save_adapter(model, tmp_path / "a.pt")
        load_adapter(fresh, tmp_path / "a.pt")
        assert torch.equal(output(fresh, inputs), trained)
        with disabled(fresh):
            assert torch.equal(output(fresh, inputs), base)
        merge(model)
        torch.testing.assert_close(output(model, inputs), trained, rtol=1e-5, atol=1e-5)
        assert not any(isinstance(module, SANLayer) for module in model.modules())
        detach(fresh)
        assert fresh.state_dict().keys() == model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


# ------------------------------------------------------------------------ layers that are refused


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


CHAIN = [Link("0"), Link("3", "0")]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "recompute",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
        lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
    ],
    ids=["weight_norm", "spectral_norm", "new weight_norm", "orthogonal", "pruned", "pruned bias"]
    + ["parametrized bias"],
)
def test_a_layer_that_computes_its_weight_or_bias_anew_is_refused_with_the_remedy(recompute):
    model = perceptron()
    recompute(model[3])
    before = [*model.named_modules()]
    with pytest.raises(ValueError, match="'3' computes its weight or bias anew.*prune.remove"):
        attach(model, CHAIN, shift=True)
    assert [*model.named_modules()] == before and not hasattr(model, "_san")


class LowPrecision(nn.Linear):
    """As timm and others have it: the plain product, in a type of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Padded1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class Padded3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 0)))


@pytest.mark.parametrize(
    "layers, x",
    [
        ((LowPrecision(6, 8), LowPrecision(8, 6)), torch.randn(2, 6)),
        ((Padded1d(6, 8, 3), Padded1d(8, 6, 3, groups=2, bias=False)), torch.randn(2, 6, 5)),
        ((Padded3d(6, 8, 2), Padded3d(8, 6, 2, dilation=2)), torch.randn(2, 6, 5, 6, 7)),
    ],
)
def test_a_subclass_that_computes_a_plain_product_is_adapted_and_stays_itself(layers, x):
    model = nn.Sequential(*layers)
    base = model(x)
    attach(model, [Link("0"), Link("1", "0")], shift=True)
    assert torch.equal(model(x), base)
    steps(model, lambda: model(x).square().mean())
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert [type(layer) for layer in model] == [type(layer) for layer in layers]


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight), self.bias)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class DoubledBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, 2 * self.bias)


class Routed(nn.Linear):
    def forward(self, x: Tensor, expert: int) -> Tensor:
        return super().forward(x)


def of_type(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


def dynamically_quantised() -> nn.Module:
    return pytest.importorskip(
        "torch.ao.nn.quantized.dynamic", reason="this torch has dropped it"
    ).Linear(4, 4)


def torchao_quantised() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


NOT_LINEAR = "does not compute W x . b with its weight as it is"


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Standardised(4, 4), f"'0', a Standardised, {NOT_LINEAR}"),
        (lambda: Rectified(4, 4), f"'0', a Rectified, {NOT_LINEAR}"),
        (lambda: DoubledBias(4, 4), f"'0', a DoubledBias, {NOT_LINEAR}"),
        (lambda: Routed(4, 4), f"'0', a Routed, {NOT_LINEAR}"),
        (lambda: package("timm").layers.StdConv2d(4, 4, 3), f"'0', a StdConv2d, {NOT_LINEAR}"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "'0' is a ConvTranspose2d; SAN adapts Linear"),
        (lambda: nn.Embedding(4, 4), "'0' is a Embedding; SAN adapts Linear"),
        (lambda: of_type(nn.Linear(4, 4), torch.int8), "'0' is quantised to torch.int8"),
        (lambda: of_type(nn.Linear(4, 4), torch.float8_e4m3fn), "'0' is quantised to torch.float8"),
        (dynamically_quantised, "'0' is a torch.ao.nn.quantized.*Linear; SAN adapts Linear"),
        (torchao_quantised, "the weight of layer '0' is a .*, not plain"),
    ],
)
def test_what_is_no_plain_product_is_refused_by_its_name(build, message):
    model = nn.Sequential(build())
    before = [*model.named_modules()]
    with pytest.raises(TypeError, match=message):
        attach(model, [Link("0")])
    assert [*model.named_modules()] == before and not hasattr(model, "_san")


# ------------------------------------------------- parents that read a layer instead of calling it


class Reader(nn.Module):
    """Calls nothing, but reads what a parent may."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.pixels = nn.Conv1d(3, 4, 2, stride=2, groups=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        assert (self.first.in_features, self.first.out_features) == (5, 8)
        assert (self.pixels.stride, self.pixels.padding_mode) == ((2,), "circular")
        x = nn.functional.linear(x, self.first.weight, self.first.bias)
        x = nn.functional.linear(x.relu(), self.second.weight, self.second.bias)
        return nn.functional.conv1d(x[:, :, None], self.pixels.weight.sum(2, True))


def test_a_parent_that_reads_a_layer_gets_the_merged_weight_and_bias_with_their_gradients():
    torch.manual_seed(0)
    model, x = Reader().double(), torch.randn(4, 5).double()
    base = model(x)
    attach(model, [Link("first"), Link("second", "first"), Link("pixels", "second")], shift=True)
    assert torch.equal(model(x), base)
    steps(model, lambda: model(x).square().mean())
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    first, second, gamma = model.first, model.second, values["first.gamma"]
    assert torch.equal(first.weight, gamma[:, None] * first.layer.weight)
    bias = gamma * first.layer.bias + values["first.beta"]
    torch.testing.assert_close(first.bias, bias, rtol=1e-15, atol=1e-15)
    columns = values["second.gamma"][:, None] * second.layer.weight * gamma
    torch.testing.assert_close(second.weight, columns, rtol=1e-15, atol=1e-15)

    def computed(*values: Tensor) -> Tensor:
        changed = dict(zip((n for n, p in model.named_parameters() if p.requires_grad), values))
        return torch.func.functional_call(model, changed, x)

    leaves = [value.requires_grad_() for value in values.values()]
    used = [leaf for name, leaf in zip(values, leaves) if name != "pixels.beta"]
    assert all(
        map(
            torch.is_nonzero,
            [g.abs().max() for g in torch.autograd.grad(computed(*leaves).sum(), used)],
        )
    )
    assert torch.autograd.gradcheck(computed, leaves)


@pytest.mark.parametrize("grad", [True, False], ids=["in training", "on the fast path"])
def test_a_transformer_encoder_layer_of_torch_reads_its_layers_weights(grad):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True).eval()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 8)
    links = [Link("self_attn.out_proj"), Link("linear1", "self_attn.out_proj")]
    attach(model, [*links, Link("linear2", "linear1")], shift=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)
    steps(model, lambda: (model(x) - 1).square().mean())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.set_grad_enabled(grad):
        trained = model(x)
        assert (trained - twin(x)).abs().max() > 1e-2
        merge(model)
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


def test_a_layer_that_keeps_something_under_a_name_of_a_san_layers_is_refused():
    model = perceptron()
    attach(model, CHAIN, shift=True)
    parts = {*vars(model[3]), *model[3]._modules, *model[3]._parameters, *model[3]._buffers}
    names = {n for n in parts - vars(nn.Linear(1, 1)).keys() if n[0] != "_"} | {"merged"}
    assert {"scale", "index", "gamma"} < names
    for name in names:
        model = perceptron()
        setattr(model[0], name, 0.5)
        with pytest.raises(ValueError, match=f"'0' keeps something called '{name}'.*rename it"):
            attach(model, CHAIN)


def test_a_linked_layer_that_a_forward_never_calls_or_reads_is_said():
    class Short(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = Short(nn.Linear(5, 8), nn.Linear(8, 8))
    attach(model, [Link("0"), Link("1", "0")])
    with pytest.warns(UserWarning, match="without its linked layers 1: their γ does not scale"):
        model(torch.randn(2, 5))


def test_a_model_with_an_adapted_part_is_not_adapted_again():
    """Its γ would be frozen with all the rest."""
    model = nn.Sequential(perceptron(), nn.Linear(3, 2))
    attach(model[0], CHAIN)
    with pytest.raises(ValueError, match="SAN layers already; merge or detach it first"):
        attach(model, [Link("1")])
    assert model[0][0].gamma.requires_grad and model[1].weight.requires_grad


# ------------------------------------------------------------- offloading, and PEFT's LoRA beside


def offloaded(model: nn.Module) -> nn.Module:
    return package("accelerate").cpu_offload(model, "cpu")


@pytest.mark.parametrize(
    "links, trainable, named", [(CHAIN, [], "0.weight"), ([Link("4")], ["1"], "1.weight")]
)
@pytest.mark.parametrize("empty", [lambda model: model.to("meta"), offloaded], ids=["meta", "cpu"])
def test_a_part_without_values_is_refused_by_name(empty, links, trainable, named):
    model = perceptron()
    empty(model[1] if trainable else model)
    with pytest.raises(ValueError, match=f"'{named}' is on the meta device.*load the model first"):
        attach(model, links, trainable=trainable)
    assert not hasattr(model, "_san")


@pytest.mark.parametrize("use", [merge, san.summary, lambda model: save_adapter(model, "none")])
def test_a_model_offloaded_with_its_gammas_says_to_merge_first(use):
    model, x = perceptron(), torch.randn(2, 5)
    attach(model, CHAIN)
    steps(model, lambda: model(x).square().mean())
    twin = copy.deepcopy(model)
    offloaded(model)
    with pytest.raises(ValueError, match="is on the meta device.*after the merge"):
        use(model)
    with pytest.raises(NotImplementedError, match="meta"):  # torch's own word
        model(x)
    trained = twin(x)
    merge(twin)
    torch.testing.assert_close(offloaded(twin)(x), trained, rtol=1e-5, atol=1e-5)


def test_in_a_model_dispatched_by_accelerate_the_parts_that_are_here_are_adapted(tmp_path):
    accelerate = package("accelerate")
    model, x = perceptron(), torch.randn(2, 5)
    base, fresh = model(x), perceptron()
    devices = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "cpu", "4": "disk"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path / "disk")
    assert model[4].weight.is_meta and model[0]._hf_hook
    attach(model, CHAIN, shift=True, trainable=["1"])
    assert torch.equal(model(x), base)
    steps(model, lambda: model(x).square().mean())
    trained = model(x)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(fresh, tmp_path / "a.pt")
    assert torch.equal(fresh(x), trained)
    with disabled(model):
        assert torch.equal(model(x), base)
    merge(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


def with_lora(model: nn.Module, *targets: str) -> nn.Module:
    peft = package("peft")
    config = peft.LoraConfig(r=2, target_modules=[*targets], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def requiring_grad(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("place", ["beside", "in one layer"])
def test_san_is_attached_to_a_model_that_has_pefts_lora(place, tmp_path):
    """In one layer: W x + b, between SAN's diagonals, and B A x are summed."""
    inside = {"beside": "", "in one layer": ".base_layer"}[place]
    targets = {"beside": ["4"], "in one layer": ["3", "4"]}[place]
    model, x = with_lora(perceptron(), *targets), torch.randn(4, 5)
    base, fresh, lora = model(x), copy.deepcopy(model), requiring_grad(model)
    first, second = "base_model.model.0", f"base_model.model.3{inside}"
    attach(model, [Link(first), Link(second, first)], shift=True, trainable=lora)
    assert len(requiring_grad(model)) == len(lora) + 4 and torch.equal(model(x), base)
    steps(model, lambda: model(x).square().mean())
    trained = model(x)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(fresh, tmp_path / "a.pt")
    assert torch.equal(fresh(x), trained)
    detach(fresh)
    assert torch.equal(fresh(x), base)
    merge(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), trained, rtol=1e-5, atol=1e-5)
    assert plain.state_dict().keys() == perceptron().state_dict().keys()


def test_pefts_lora_is_put_inside_of_a_san_layer_and_merged_before_it():
    """Then SAN's diagonals act around the updated weight."""
    model, x = perceptron(), torch.randn(4, 5)
    attach(model, CHAIN, shift=True)
    wrapped = with_lora(model, "3.layer", "4")
    assert not any("gamma" in name for name in requiring_grad(model))  # PEFT freezes all else
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(("gamma", "beta")))
    steps(model, lambda: model(x).square().mean())
    lora, trained = model[3].layer, model(x)
    hidden = model[3].anterior[0].gamma * model[2](model[1](model[0](x)))
    expected = model[3].gamma * lora(hidden) + model[3].beta
    torch.testing.assert_close(model[3](model[2](model[1](model[0](x)))), expected)
    with pytest.raises(ValueError, match="inside of layer '3' .* merge that first"):
        merge(model)
    assert model[3].layer is lora and torch.equal(model(x), trained)
    wrapped.merge_and_unload()
    merge(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == perceptron().state_dict().keys()


def test_pefts_layer_and_a_san_layer_refuse_each_other_by_name():
    with pytest.raises(TypeError, match="'base_model.model.0' is a peft.*Linear; SAN adapts"):
        attach(with_lora(perceptron(), "0"), [Link("base_model.model.0")])
    model = perceptron()
    attach(model, CHAIN)
    with pytest.raises(ValueError, match=r"SANLayer[\s\S]* is not supported"):
        with_lora(model, "0")
