"""san.py under what people put around a model: torch.func, compile, AMP, DDP, FSDP2 and more."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import san
from san import Link, attach, detach, disabled, load_adapter, merge, save_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:the model ran without its linked layers"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(7), nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Three blocks whose links cross from block to block."""

    links = [Link("stem"), Link("blocks.0.fc1", "stem"), Link("blocks.0.fc2", "blocks.0.fc1")]
    links += [Link("blocks.1.fc1", "blocks.0.fc2"), Link("blocks.1.fc2", "blocks.1.fc1")]
    links += [Link("blocks.2.fc1", "blocks.1.fc2", range(7)), Link("blocks.2.fc2", "blocks.2.fc1")]

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.stem, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TRAINABLE = ["blocks.1.norm", "norm", "head"]


def inputs() -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def plain() -> Net:
    return Net().eval()


def moved(model: nn.Module, seed: int = 2) -> nn.Module:
    """Stands for training: all that requires a gradient."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def adapted(dtype: torch.dtype = torch.float32, **settings) -> Net:
    model = plain().to(dtype)
    attach(model, Net.links, **{"shift": True, "trainable": TRAINABLE} | settings)
    return moved(model)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {san._plain(n): p.grad for n, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(
        (one[key] - other[key]).abs().max() <= tolerance * other[key].abs().max() for key in other
    )


# ------------------------------------------------------------------- torch.func, double backward


class Merged(nn.Module):
    """A SAN layer by its W* and b*, so by autograd's own rules alone."""

    def __init__(self, layer: san.SANLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def pair() -> tuple[nn.Module, nn.Module, dict[str, Tensor], Tensor]:
    """(an adapted model, the same by W* and b*, the parameters that train, inputs), in float64"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    attach(model.double(), [Link("0"), Link("2", "0"), Link("4", "2", [2, 0, 1])], shift=True)
    values = {n: p.detach() for n, p in moved(model).named_parameters() if p.requires_grad}
    twin = nn.Sequential(*(Merged(m) if isinstance(m, san.SANLayer) else m for m in model))
    return model, twin, values, torch.randn(3, 5).double()


def called(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with these values in place of its own."""
    inside = ".layer" if isinstance(model[0], Merged) else ""
    changed = {name.replace(".", f"{inside}.", 1): value for name, value in values.items()}
    return functional_call(model, changed, (x,))


def scalar(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: called(model, values, x).square().sum()


def directions(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cos() for name, value in values.items()}


def ensemble(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    stacked = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
    return vmap(lambda one: called(model, one, x))(stacked)


def backward_through_vmap(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> tuple:
    leaves = [value.clone().requires_grad_() for value in values.values()]
    changed = dict(zip(values, leaves))
    return torch.autograd.grad(
        vmap(lambda one: called(model, changed, one))(x).square().sum(), leaves
    )


def penalty(model: nn.Module, values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the size of a gradient."""
    leaves, x = [value.clone().requires_grad_() for value in values.values()], x.requires_grad_()
    loss = scalar(model)(dict(zip(values, leaves)), x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), [*leaves, x])


TRANSFORMS = {
    "grad": lambda model, values, x: grad(scalar(model))(values, x),
    "per-sample gradients": lambda model, values, x: vmap(grad(scalar(model)), (None, 0))(
        values, x
    ),
    "an ensemble of adapters": ensemble,
    "backward through vmap": backward_through_vmap,
    "jvp": lambda model, values, x: jvp(
        lambda *both: called(model, *both),
        (values, x),
        (directions(values), x.cos()),
    ),
    "hessian": lambda model, values, x: hessian(scalar(model))(values, x),
    "reverse over forward": lambda model, values, x: jacrev(jacfwd(scalar(model)))(values, x),
    "reverse over reverse": lambda model, values, x: jacrev(jacrev(scalar(model)))(values, x),
    "forward over forward": lambda model, values, x: jacfwd(jacfwd(scalar(model)))(values, x),
    "jacobian by batched gradients": lambda model, values, x: torch.autograd.functional.jacobian(
        model, x, vectorize=True
    ),
    "jacobian, forward": lambda model, values, x: torch.autograd.functional.jacobian(
        model, x, vectorize=True, strategy="forward-mode"
    ),
    "gradient penalty": penalty,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_what_autograd_gives_of_the_merged_form(transform):
    model, twin, values, x = pair()
    got = TRANSFORMS[transform](model, values, x)
    torch.testing.assert_close(got, TRANSFORMS[transform](twin, values, x), rtol=1e-10, atol=1e-12)


# -------------------------------------------------------- torch.compile, and names behind wrappers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_no_graph_break_and_the_outputs_and_gradients_of_the_eager_one(dtype):
    """In bfloat16 what `trainable` names is rounded from float32 on the way."""
    model, x = adapted(dtype), inputs().to(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(compiled(x), model(x), rtol=tolerance, atol=tolerance)
    expected = gradients(model, lambda: model(x).square().sum())
    assert same(gradients(compiled, lambda: compiled(x).square().sum()), expected, tolerance)


def test_a_compiled_model_follows_attach_disabled_detach_and_merge():
    model, x = plain(), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base = compiled(x)
    for end in (merge, detach):
        attach(compiled, Net.links, trainable=TRAINABLE)
        trained = moved(model)(x)
        torch.testing.assert_close(compiled(x), trained)
        with disabled(compiled):
            torch.testing.assert_close(compiled(x), base)
        torch.testing.assert_close(compiled(x), trained)
        end(compiled)
        base = base if end is detach else trained
        torch.testing.assert_close(compiled(x), base, rtol=1e-5, atol=1e-5)


def compiled_block(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_layer(model: nn.Module) -> nn.Module:
    model.blocks[1].fc1 = torch.compile(model.blocks[1].fc1, backend="eager")
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.blocks[1].compile(backend="eager")
    return model


def checkpointed_block(model: nn.Module) -> nn.Module:
    name = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    model.blocks[1] = pytest.importorskip(name).checkpoint_wrapper(model.blocks[1])
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    """DataParallel, which would move the model to a GPU where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return nn.DataParallel(model)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": data_parallel,
    "compiled DataParallel": lambda model: torch.compile(data_parallel(model), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled block": compiled_block,
    "compiled layer": compiled_layer,
    "block compiled in place": compiled_in_place,
    "checkpointed block": checkpointed_block,
}


@pytest.mark.parametrize("first", ["wrap", "attach"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_function_sees_through_a_wrapper_and_files_hold_plain_names(wrapper, first, tmp_path):
    wrap, x, path = WRAPPERS[wrapper], inputs(), tmp_path / "a.pt"
    base, expected = plain()(x), adapted()(x)
    if first == "wrap":
        model = wrap(plain())
        attach(model, Net.links, shift=True, trainable=TRAINABLE)
        moved(model)
    else:
        model = wrap(adapted())
    torch.testing.assert_close(model(x), expected)
    with disabled(model):
        assert torch.equal(model(x), base)
    assert san.summary(model) == san.summary(adapted())
    save_adapter(model, path)
    save_adapter(adapted(), tmp_path / "plain.pt")
    content, of_plain = san.read(path), san.read(tmp_path / "plain.pt")
    assert content.pop("values").keys() == of_plain.pop("values").keys()
    assert str(content) == str(of_plain)
    for end, output in ((merge, expected), (detach, base)):
        fresh = wrap(plain())
        load_adapter(fresh, path)
        torch.testing.assert_close(fresh(x), expected)
        end(fresh)
        torch.testing.assert_close(fresh(x), output, rtol=1e-5, atol=1e-5)
        assert fresh.state_dict().keys() == wrap(plain()).state_dict().keys()


def test_links_and_trainable_may_name_a_wrapper_as_named_modules_does():
    model = WRAPPERS["compiled block"](WRAPPERS["compile"](plain()))
    names = [name for name, _ in model.named_modules()]
    first, second = "_orig_mod.stem", "_orig_mod.blocks.1._orig_mod.fc1"
    norm = "_orig_mod.blocks.1._orig_mod.norm"
    assert {first, second, norm} < {*names}
    attach(model, [Link(first), Link(second, first)], trainable=[norm])
    assert san.summary(model)["trainable"] == 7 + 9 + 7 + 7


@pytest.mark.parametrize("side", ["inside", "outside", "on its own"])
def test_of_a_compiled_model_too_a_backward_pass_on_the_other_side_of_disabled_is_refused(side):
    model, x = adapted(), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    expected = gradients(model, lambda: model(x).square().sum())
    output = compiled(x)
    with disabled(compiled):
        if side == "inside":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        base = compiled(x.requires_grad_())
    if side == "outside":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            base.sum().backward()
    if side == "on its own":
        assert same(gradients(model, lambda: output.square().sum()), expected, 1e-5)


def test_a_first_forward_inside_of_disabled_is_the_base_models():
    model, x = adapted(), inputs()
    with disabled(model):
        assert torch.equal(model(x), plain()(x))
    assert not torch.equal(model(x), plain()(x))


# ------------------------------------------------- autocast, half precision, checkpointing, copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_a_gradient_scaler_the_gradients_are_those_of_float32(dtype):
    model, x = adapted(), inputs()
    expected = gradients(model, lambda: model(x).square().mean())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype):
            assert model.stem(x).dtype == plain().stem(x).dtype == dtype
            return scaler.scale(model(x).float().square().mean())

    scaled = gradients(model, loss)
    scaler.unscale_(optimiser)
    assert same(scaled, expected, 0.1)
    before = model.stem.gamma.detach().clone()
    scaler.step(optimiser)
    torch.testing.assert_close(model.stem.gamma, before - 0.1 * scaled["stem.gamma"])


def test_inside_of_autocast_disabled_does_not_see_the_trained_weights():
    """Which autocast keeps, in half precision, until it ends."""
    model, x = adapted(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        base, expected = plain()(x), model(x)
        with disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("built", ["inside", "outside"])
def test_attach_under_inference_mode_is_refused_since_nothing_would_train(built):
    with torch.inference_mode(built == "inside"):
        model = plain()
    with torch.inference_mode(built == "outside"):
        with pytest.raises(ValueError, match=r"torch.inference_mode\(\) makes cannot train"):
            attach(model, Net.links)
    assert not hasattr(model, "_san")


@pytest.mark.parametrize("end", [merge, detach])
def test_what_merge_and_detach_give_back_under_inference_mode_can_be_trained(end):
    model, x = adapted(torch.bfloat16), inputs().bfloat16()
    with torch.inference_mode():
        with disabled(model):
            assert torch.equal(model(x), plain().bfloat16()(x))
        end(model)
    found = gradients(model.requires_grad_(), lambda: model(x).sum())
    assert [*found] == [name for name, _ in plain().named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_beside_a_half_precision_model_trains_in_float32(dtype, tmp_path):
    model, x = plain().to(dtype), inputs().to(dtype)
    base = model(x)
    attach(model, Net.links, trainable=TRAINABLE)
    assert torch.equal(model(x), base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.head.weight.dtype == model(x).dtype == dtype
    step = 2.0**-12  # from 1, less than either type can tell apart
    with torch.no_grad():
        for _ in range(64):
            for parameter in [p for p in model.parameters() if p.requires_grad]:
                parameter += step
    moved_by = model.blocks[1].norm.weight.detach().float() - 1
    torch.testing.assert_close(moved_by, torch.full((7,), 64 * step), rtol=0, atol=2.0**-8)
    trained, fresh = model(x), plain().to(dtype)
    assert not torch.equal(trained, base)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(fresh, tmp_path / "a.pt")
    assert torch.equal(fresh(x), trained)
    merge(model)
    torch.testing.assert_close(model(x), trained, rtol=0.05, atol=0.05)
    detach(fresh)
    for end in (model, fresh):
        state = end.state_dict()
        assert {k: v.dtype for k, v in state.items()} == {
            k: v.dtype for k, v in plain().to(dtype).state_dict().items()
        }
        assert type(end.head) is nn.Linear
    assert torch.equal(fresh(x), base)


def test_a_merged_weight_beyond_float16_is_refused_by_name_and_the_model_stays_whole():
    model, x = adapted(torch.float16), inputs().half()
    model.blocks[1].fc1.gamma.data.fill_(3e5)
    before, modules, state = model(x), [*model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"merged weight of layer 'blocks.1.fc1' .* torch.float16"):
        merge(model)
    assert [*model.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), before, equal_nan=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Of a γ' that comes from a block outside of the checkpoint, too."""
    from torch.utils.checkpoint import checkpoint

    model, x = adapted(), inputs().requires_grad_()
    expected = gradients(model, lambda: model(x).square().sum())
    for block in model.blocks:
        block.forward = lambda x, call=block.forward: checkpoint(call, x, use_reentrant=reentrant)
    assert same(gradients(model, lambda: model(x).square().sum()), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_own_gradient_checkpointing_gives_the_same_gradients(reentrant):
    hf = pytest.importorskip("transformers", reason="the model is one of transformers'")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **sizes)).train()
    root = "model.layers"
    links = [
        Link(f"{root}.0.mlp.up_proj"),
        Link(f"{root}.0.mlp.down_proj", f"{root}.0.mlp.up_proj"),
    ]
    attach(model, [*links, Link(f"{root}.1.self_attn.q_proj", f"{root}.0.mlp.down_proj")])
    tokens = torch.arange(6)[None]
    expected = gradients(model, lambda: model(input_ids=tokens, labels=tokens).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert same(gradients(model, lambda: model(input_ids=tokens, labels=tokens).loss), expected)


def by_torch_save(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_whole_and_its_gammas_are_its_own(kind):
    model, x = adapted(), inputs()
    expected, base = model(x), plain()(x)
    twin = COPIES[kind](model)
    assert torch.equal(twin(x), expected)
    assert twin.blocks[1].fc1.vectors()[0] is twin.blocks[0].fc2.gamma
    with disabled(twin):
        assert torch.equal(twin(x), base)
    moved(twin, seed=3)
    assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
    trained = twin(x)
    merge(twin)
    torch.testing.assert_close(twin(x), trained, rtol=1e-5, atol=1e-5)


def test_half_precision_with_float32_copies_is_deep_copied_and_not_pickled_as_torch_says():
    model, x = adapted(torch.bfloat16), inputs().bfloat16()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert not torch.equal(moved(twin)(x), model(x))
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state"):
        pickle.dumps(model)


def test_a_merged_model_is_exported_as_any(tmp_path):
    model, x = adapted(), inputs()
    expected = model(x)
    batch = {0: torch.export.Dim("batch")}
    of_adapted = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    torch.testing.assert_close(of_adapted.module()(x[:3]), expected[:3])
    merge(model)
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    of_base = torch.export.export(plain(), (x,), dynamic_shapes=(batch,)).graph.nodes
    assert calls == [str(node.target) for node in of_base if node.op == "call_function"]


def test_a_merged_model_runs_as_onnx(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"torch.onnx needs {name}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the file")
    model, x = adapted(), inputs()
    expected = model(x)
    merge(model)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", input_names=["x"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.tensor(output), expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- many devices

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=no_gpu)])
def test_a_gamma_is_brought_to_the_device_of_the_layer_that_reads_it(device):
    """The meta device stands for a second one: it computes shapes and refuses a mixture."""

    class Spread(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.stem(x)).to(device)
            return self.head(self.norm(self.blocks[2](self.blocks[1](x))))

    model = Spread().eval()
    attach(model, Net.links, shift=True)
    moved(model)
    for part in (model.blocks[1], model.blocks[2], model.norm, model.head):
        part.to(device)
    output = model(inputs())
    assert (output.device.type, output.shape) == (device, (8, 3))
    weight = model.blocks[1].fc1.merged()[0]
    assert (weight.device.type, weight.shape) == (device, (9, 7))
    if device == "cuda":
        torch.testing.assert_close(output.cpu(), adapted(trainable=[])(inputs()))
