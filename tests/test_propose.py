"""lab/propose.py: the links that a model shows when it is asked are those that its code has."""

import sys

import pytest
import torch
import torch.nn.functional as F
from running import command_of
from torch import nn

import models
import san
from lab import propose as script
from lab.propose import propose, to_python, written
from models import LLaMA
from san import Link

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:left out"),  # no layer is left out unless the test says so
]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 10) -> torch.Tensor:
    return torch.randint(40, (1, count), generator=torch.Generator().manual_seed(1))


def plain(links) -> list[tuple]:
    return [(layer, a, None if i is None else [*i]) for layer, a, i in links]


def found(model: nn.Module, example=None, **options) -> tuple[list[tuple], list[str]]:
    """The links, and the layers whose links are exact."""
    proposals = propose(model, noise(1, 6, 24) if example is None else example, **options)
    for proposal in proposals:
        assert (proposal.kind == "none") == (proposal.link.anterior is None)
        assert (proposal.kind == "none") == bool(proposal.reason)
        assert 0 <= proposal.share < 1.001
    exact = [proposal.link.layer for proposal in proposals if proposal.kind == "exact"]
    return plain(proposal.link for proposal in proposals), exact


class Net(nn.Module):
    """Layers by name, and a function that says how they are called."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def mlp(between, hidden: int = 32, inputs: int | None = None) -> Net:
    """24 channels → a → between → b → the head."""
    return Net(
        lambda net, x: net.head(net.b(between(net.a(x)))),
        a=nn.Linear(24, hidden),
        b=nn.Linear(inputs or hidden, 16),
        head=nn.Linear(16, 3),
    )


# --------------------------------------------------------------------------- our four backbones


@pytest.mark.parametrize("name", ["vit_micro", "convnext_micro", "swin_micro"])
def test_a_vision_models_links_are_found_and_told_exact_or_not(name):
    model = models.build(name, outputs=5)
    links, exact = found(model, noise(1, 3, 32, 32))
    assert links == plain(model.links())
    values = [layer for layer, _, index in links if layer.endswith("attn.proj")]
    after_downsample = [layer for layer, a, _ in links if "dwconv" in layer and "down" in a]
    assert exact == values + after_downsample and exact


def test_llamas_links_are_found_grouped_queries_too():
    model = LLaMA(vocab=40, dim=32, depth=2, heads=4, kv_heads=2, hidden=48, context=16)
    links, exact = found(model, tokens())
    assert links == plain(model.links())
    assert exact == [layer for layer, *_ in links if layer.endswith(("o_proj", "down_proj"))]


def inputs_of(model: nn.Module, x: torch.Tensor, layer: str, anterior: str, gamma: torch.Tensor):
    """The input of `layer`, …×J, in the model itself with γ on the outputs of `anterior`."""
    seen = []
    hooks = [
        model.get_submodule(anterior).register_forward_hook(lambda m, args, out: out * gamma),
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen[0]


def test_in_the_model_itself_an_exact_link_scales_its_input_and_another_does_not():
    model, x = models.build("vit_micro", outputs=5).eval().double(), noise(1, 3, 32, 32).double()
    checked = []
    for link, kind, *_ in propose(model, x):
        if kind == "none" or link.anterior == "patch_embed":  # a convolution's channels come first
            continue
        outputs = model.get_submodule(link.anterior).out_features
        index = [*range(outputs)] if link.index is None else [*link.index]
        gamma = torch.ones(outputs, dtype=torch.float64)
        gamma[index] += 0.5 * noise(len(index)).double()
        before = inputs_of(model, x, link.layer, link.anterior, torch.ones_like(gamma))
        after = inputs_of(model, x, link.layer, link.anterior, gamma)
        assert torch.allclose(after, gamma[index] * before, rtol=1e-9) == (kind == "exact")
        checked.append(kind)
    assert {*checked} == {"exact", "through"}


# ------------------------------------------------------------------------------ other libraries


def attaches(model: nn.Module, example: torch.Tensor, links: list[tuple]) -> bool:
    """Whether san.attach takes the links, and the output stays."""
    model.eval()
    with torch.no_grad():
        before = model(example)
        san.attach(model, [Link(*link) for link in links])
        return torch.allclose(model(example), before, atol=1e-6)


def vit_block(stream: str, names: list[str], dim: int, thirds: bool) -> list[tuple]:
    """The links of a pre-norm block with a fused qkv, or with q, k and v (names in that order)."""
    *reads, out, up, down = names
    value = ([*range(2 * dim, 3 * dim)]) if thirds else None
    links = [(read, stream, None) for read in reads]
    return links + [(out, reads[-1], value), (up, out, None), (down, up, None)]


def test_timms_vit():
    timm = pytest.importorskip("timm", reason="pip install timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=5
    )
    images = noise(1, 3, 32, 32)
    links, exact = found(model, images)
    expected = [("patch_embed.proj", None, None)]
    for i in range(2):
        names = [f"blocks.{i}.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        expected += vit_block(expected[-1][0], names, 48, thirds=True)
    assert links == expected
    assert exact == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert attaches(model, images, links)


def test_timms_convnext():
    timm = pytest.importorskip("timm", reason="pip install timm")
    model = timm.create_model(
        "convnext_atto", depths=(2, 1, 1, 1), dims=(16, 24, 32, 40), num_classes=5
    )
    names, block = ["stem.0"], ("conv_dw", "mlp.fc1", "mlp.fc2")
    for stage, index in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0)):
        names += [f"stages.{stage}.downsample.1"] * (stage > 0)
        names += [f"stages.{stage}.blocks.{index}.{layer}" for layer in block]
    links, exact = found(model, images := noise(1, 3, 64, 64))
    assert links == [(b, a, None) for a, b in zip([None, *names], names)]
    assert exact == [f"stages.{stage}.blocks.0.conv_dw" for stage in (1, 2, 3)]
    assert attaches(model, images, links)


def test_torchvisions_swin_never_calls_its_attention_layers_and_they_are_left_out():
    swin = pytest.importorskip("torchvision").models.SwinTransformer
    model = swin([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)
    with pytest.warns(UserWarning, match=r"never called.*features.1.0.attn.qkv, and 7 more"):
        links, exact = found(model, noise(1, 3, 32, 32))
    assert [layer for layer, *_ in links] == [
        "features.0.0",
        *(f"features.1.{i}.mlp.{j}" for i in (0, 1) for j in (0, 3)),
        "features.2.reduction",
        *(f"features.3.{i}.mlp.{j}" for i in (0, 1) for j in (0, 3)),
    ]
    anteriors = {layer: (anterior, index) for layer, anterior, index in links}
    for layer in anteriors:
        if layer.endswith("mlp.3"):
            assert anteriors[layer] == (layer.replace("mlp.3", "mlp.0"), None)
    assert anteriors["features.2.reduction"] == ("features.1.1.mlp.3", [*range(24)] * 4)
    # what attention writes is not seen: it is the block before that is read, or nothing
    assert anteriors["features.3.1.mlp.0"] in (("features.3.0.mlp.3", None), (None, None))


def test_transformers_llama():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    groups, expected, stream = [head // 2 * 8 + c for head in range(4) for c in range(8)], [], None
    for i in range(2):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        expected += [(f"{attn}.{name}_proj", stream, None) for name in "qkv"]
        expected.append((f"{attn}.o_proj", f"{attn}.v_proj", groups))
        expected += [(f"{mlp}.{name}_proj", f"{attn}.o_proj", None) for name in ("gate", "up")]
        expected.append((f"{mlp}.down_proj", f"{mlp}.up_proj", None))
        stream = f"{mlp}.down_proj"
    links, exact = found(model, {"input_ids": tokens()})
    assert links == expected
    assert exact == [layer for layer, *_ in links if layer.endswith(("o_proj", "down_proj"))]
    san.attach(model, [Link(*link) for link in links])


def test_transformers_vit_and_gpt2():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    model = transformers.ViTModel(config)
    links, exact = found(model, {"pixel_values": noise(1, 3, 32, 32)})
    linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    patches, *blocks, pooler = linear
    expected = [(patches, None, None)]
    for i in (0, 6):
        expected += vit_block(expected[-1][0], blocks[i : i + 6], 32, thirds=False)
    expected.append((pooler, expected[-1][0], None))
    assert len(blocks) == 12 and links == expected
    assert exact == [blocks[3], blocks[9]]

    model = transformers.GPT2Model(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=40, bos_token_id=None, eos_token_id=None
        )
    )
    expected, stream = [], None
    for i in range(2):
        names = [f"h.{i}.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        expected += vit_block(stream, names, 32, thirds=True)
        stream = names[-1]
    links, exact = found(model, (tokens(),))
    assert links == expected and exact == ["h.0.attn.c_proj", "h.1.attn.c_proj"]


# ------------------------------------------------------------------------ what can stand between


def test_a_flatten_repeats_each_channel_for_its_places():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(12 * 16, 32),
        nn.Linear(32, 5),
    )
    links, exact = found(model, noise(1, 3, 20, 20))
    flat = [c for c in range(12) for _ in range(16)]
    assert links == [("0", None, None), ("3", "0", None), ("8", "3", flat)]
    assert exact == ["3"]  # a ReLU and a maximum let γ > 0 through, BatchNorm does not


PERMUTATION = torch.randperm(32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "between, hidden, index, exact",
    [
        (lambda x: x, 32, None, True),
        (F.relu, 32, None, True),
        (F.gelu, 32, None, False),
        (F.sigmoid, 32, None, False),
        (lambda x: F.layer_norm(x, x.shape[-1:]), 32, None, False),
        (lambda x: x + 1, 32, None, False),
        (lambda x: x[..., PERMUTATION], 32, PERMUTATION.tolist(), True),
        (lambda x: x.flip(-1), 32, [*range(31, -1, -1)], True),
        (lambda x: x[..., 8:24], 32, [*range(8, 24)], True),
        (lambda x: x.repeat_interleave(3, -1), 8, [c for c in range(8) for _ in range(3)], True),
        (lambda x: 1e-6 * x, 32, None, True),
        (lambda x: x + torch.randn_like(x), 32, None, False),
        (lambda x: (a := x.chunk(2, -1))[0] * F.silu(a[1]), 64, [*range(32)], True),
        (lambda x: (a := x.chunk(2, -1))[1] * F.silu(a[0]), 64, [*range(32, 64)], True),
    ],
)
def test_an_index_is_found_and_what_stands_between_is_told(between, hidden, index, exact):
    inputs = len(between(torch.ones(1, hidden))[0])
    links, exacts = found(mlp(between, hidden, inputs))
    assert links == [("a", None, None), ("b", "a", index)]
    assert exacts == ["b"] * exact


def test_one_place_is_enough():
    links, exact = found(mlp(F.relu, hidden=200), noise(1, 24))
    assert links == [("a", None, None), ("b", "a", None)] and exact == ["b"]


def test_what_mixes_channels_leaves_no_anterior():
    mix = noise(32, 32)
    _, b = propose(mlp(lambda x: F.gelu(x @ mix.to(x))), noise(1, 6, 24))
    assert b.link == Link("b") and b.kind == "none"
    assert b.share < 0.3 and "'a'" in b.reason
    # half of what b reads is a's, and half is mixed
    _, b = propose(mlp(lambda x: torch.cat([x, x @ mix.to(x)], -1), 32, 64), noise(1, 6, 24))
    assert b.link == Link("b")


def test_an_input_that_never_moves_has_no_anterior():
    _, b = propose(mlp(lambda x: torch.ones_like(x)), noise(1, 6, 24))
    assert (b.kind, b.share) == ("none", 0) and b.reason == "no earlier layer moves its input"


def test_the_gate_does_not_win_for_being_called_last():
    model = Net(
        lambda net, x: net.head(net.down(net.up(x := net.a(x)) * F.silu(net.gate(x)))),
        a=nn.Linear(24, 24),
        up=nn.Linear(24, 32),
        gate=nn.Linear(24, 32),
        down=nn.Linear(32, 24),
        head=nn.Linear(24, 3),
    )
    links, exact = found(model)
    assert links[-1] == ("down", "up", None) and exact == ["up", "gate", "down"]


def squeeze_and_excite(net, x):
    x = F.silu(net.dw(net.a(x)))
    gate = net.expand(F.relu(net.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
    return net.head(net.project(x * gate).mean((2, 3)))


def test_squeeze_and_excite_modulates_and_carries_nothing():
    model = Net(
        squeeze_and_excite,
        a=nn.Conv2d(3, 24, 3),
        dw=nn.Conv2d(24, 24, 3, groups=24),
        reduce=nn.Conv2d(24, 8, 1),
        expand=nn.Conv2d(8, 24, 1),
        project=nn.Conv2d(24, 16, 1),
        head=nn.Linear(16, 3),
    )
    links, _ = found(model, noise(1, 3, 16, 16))
    assert [anterior for _, anterior, _ in links] == [None, "a", "dw", "reduce", "dw"]


def test_values_do_not_matter():
    """Dead channels, zeros, outliers: what is asked is how the layers are put together."""
    model = nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 3)
    )
    model = nn.Sequential(*model, nn.Linear(3, 3))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # every ReLU is dead
        model[2].weight.zero_()
        model[3].weight[:40] = 0
        model[2].bias[5] = 1e4
    links, _ = found(model)
    assert links == [("0", None, None), ("2", "0", None), ("4", "2", None)]


# ----------------------------------------------------------------------- what the model is asked


def test_the_model_is_left_bit_for_bit_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Dropout(), nn.Conv2d(16, 8, 3), nn.Flatten()
    )
    model = nn.Sequential(*model, nn.Linear(8 * 144, 2)).to(torch.bfloat16).train()
    model[1].eval()
    model[0].requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[0].register_forward_hook(lambda *args: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [{**vars(m)} for m in model.modules()]
    random, images = torch.get_rng_state(), noise(1, 3, 16, 16)
    links, _ = found(model, images)
    assert links[1] == ("3", "0", None)
    after = model.state_dict()
    assert [*after] == [*state] and all(after[k].equal(v) for k, v in state.items())
    assert all(after[key].dtype == value.dtype for key, value in state.items())
    assert [{**vars(m)} for m in model.modules()] == attributes
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert model[3].weight.grad.eq(1).all()
    assert torch.get_rng_state().equal(random) and images.dtype == torch.float32


def test_the_example_is_a_tensor_a_tuple_or_a_dict():
    model = Net(
        lambda net, x, scale=None: net.head(net.b(F.gelu(net.a(x) * scale))),
        a=nn.Linear(24, 32),
        b=nn.Linear(32, 16),
        head=nn.Linear(16, 3),
    )
    x, scale = noise(1, 6, 24), torch.ones(32)
    expected = [("a", None, None), ("b", "a", None)]
    assert found(model, (x, scale))[0] == expected
    assert found(model, {"x": x, "scale": scale})[0] == expected
    assert found(mlp(F.gelu), x)[0] == expected


def test_a_model_called_twice_is_linked_if_both_calls_agree():
    def twins(net, x):
        return sum(net.head(net.b(F.gelu(net.a(y)))).mean() for y in (x, x[:, :3]))

    def loop(net, x):
        x = net.a(x)
        for _ in range(2):
            x = net.c(F.gelu(net.b(x)))
        return net.head(x)

    layers = dict(a=nn.Linear(24, 32), b=nn.Linear(32, 32), head=nn.Linear(32, 3))
    links, _ = found(Net(twins, **layers), skip="head")
    assert links == [("a", None, None), ("b", "a", None)]
    links, _ = found(Net(loop, **layers, c=nn.Linear(32, 32)), skip="head")
    # b reads a at first and c then
    assert links == [("a", None, None), ("b", None, None), ("c", "b", None)]


def test_the_head_is_left_out_unless_asked_for():
    model = mlp(F.gelu)
    assert [layer for layer, *_ in found(model)[0]] == ["a", "b"]
    assert found(model, skip=())[0][-1] == ("head", "b", None)
    assert [layer for layer, *_ in found(model, skip=["b"])[0]] == ["a", "head"]
    features = Net(lambda net, x: F.layer_norm(net.a(x), [32]), a=nn.Linear(24, 32))
    assert found(features)[0] == [("a", None, None)]  # what it returns is no layer's output
    with pytest.raises(ValueError, match="no layer or module 'haed' to skip"):
        propose(model, noise(1, 6, 24), skip="haed")


def test_what_cannot_be_linked_is_named():
    x = noise(1, 6, 24)
    spare = mlp(F.gelu)
    spare.spare = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"left out \(never called.*spare"):
        assert found(spare)[0] == [("a", None, None), ("b", "a", None)]
    tied = mlp(F.gelu, hidden=24, inputs=24)
    tied.b = nn.Linear(24, 24)
    tied.b.weight = tied.a.weight
    tied.head = nn.Linear(24, 3)
    with pytest.warns(UserWarning, match=r"left out \(.*another.*: a, and 1 more"):
        with pytest.raises(ValueError, match="no linear or convolutional layer"):
            propose(tied, x)
    other = nn.Sequential(nn.Linear(24, 8), nn.Bilinear(8, 8, 8), nn.Linear(8, 8), nn.GELU())
    net = Net(lambda net, x: net.c(net.b(z := net.a(x), z)).relu(), a=other[0], b=other[1])
    net.c = other[2]
    with pytest.warns(UserWarning, match=r"left out \(of a kind.*: b, Bilinear"):
        assert found(net)[0] == [("a", None, None), ("c", None, None)]
    # its fast path calls nothing, and reads the weights
    encoder = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    with pytest.warns(UserWarning, match="never called.*out_proj, and 2 more"):
        with pytest.raises(ValueError, match="no linear or convolutional layer"):
            propose(encoder, x)


def test_a_model_that_takes_no_random_parameters_keeps_its_own():
    model = mlp(lambda x: x)
    model.scale = nn.Parameter(torch.ones(1, 32))
    model.function = lambda net, x: net.head(net.b(net.a(x) * net.scale.sqrt()))
    with pytest.raises(ValueError, match="'b' is not finite.*redraw=False"):
        propose(model, noise(1, 6, 24))
    assert found(model, redraw=False) == ([("a", None, None), ("b", "a", None)], ["b"])


def test_a_layer_that_values_call_or_not_is_named():
    def forward(net, x):
        x = net.a(x)
        return net.head(net.b(x) if x.sum() > 0 else net.c(x))

    layers = dict(a=nn.Linear(24, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 32))
    model = Net(forward, **layers, head=nn.Linear(32, 3))
    with pytest.warns(UserWarning, match="left out"):  # the example calls one of the two
        with pytest.raises(ValueError, match="whether '[bc]' is called hangs on values"):
            propose(model, noise(1, 6, 24))


# ------------------------------------------------------------------------------------ in writing


@pytest.mark.parametrize(
    "index, text",
    [
        (range(64, 96), "range(64, 96)"),
        (range(32), "range(32)"),
        (range(0, 32, 2), "range(0, 32, 2)"),
        (range(7, -1, -1), "range(7, -1, -1)"),
        ([*range(8)] * 4, "[a for _ in range(4) for a in range(8)]"),
        ([c for c in range(8) for _ in range(4)], "[a for a in range(8) for _ in range(4)]"),
        (
            [head // 2 * 8 + c for head in range(4) for c in range(8)],
            "[a + b for a in range(0, 16, 8) for _ in range(2) for b in range(8)]",
        ),
        ([8, 9, 4, 5], "[a + b for a in range(8, 0, -4) for b in range(2)]"),
        ([3] * 5, "[3 for _ in range(5)]"),
        ([5], "[5]"),
        ([4, 0, 1, 3, 2], "[4, 0, 1, 3, 2]"),
    ],
)
def test_an_index_is_written_short_and_reads_back(index, text):
    assert written(index) == text
    assert [*eval(text)] == [*index]


def test_the_printed_python_is_the_links():
    model = models.Swin(
        5, image_size=16, patch=2, window=4, dim=16, depths=(1, 1), heads=(2, 2), drop_path=0
    )
    proposals = propose(model, noise(1, 3, 16, 16))
    text = to_python(proposals)
    names = {}
    exec(text, names)
    assert plain(names["links"]) == plain(proposal.link for proposal in proposals)
    assert "range(32, 48)),  # exact, share 1.00" in text
    assert 'Link("patch_embed"),  # none found: no earlier layer moves its input' in text
    assert attaches(model, noise(1, 3, 16, 16), names["links"])


def test_the_command_prints_the_links_of_a_named_model(capsys, monkeypatch):
    command = command_of(script)
    monkeypatch.setitem(
        models.SIZES,
        "convnext_micro",
        (models.ConvNeXt, 16, dict(depths=(1,), dims=(16,), drop_path=0)),
    )
    assert command("convnext_micro") == 0
    assert 'Link("stages.0.0.pwconv2", "stages.0.0.pwconv1"),  # through' in capsys.readouterr().out
    for name in (
        "convnext_mikro",
        "timm:no_such_model",
        "torchvision:no_such_model",
        "huggingface:x",
    ):
        assert command(name) == 2
        assert f"no model '{name}'; give timm:NAME" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "timm", None)  # what an import of a missing package finds
    assert command("timm:vit_tiny_patch16_224") == 2
    assert "timm is not installed; pip install timm" in capsys.readouterr().err
