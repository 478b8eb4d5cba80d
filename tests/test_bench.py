"""lab/bench.py: a table's rows and columns, what the limit computes, what SAN adds. No times."""

import argparse
import importlib.util
import re

import pytest
import torch
from running import command_of
from tiny import random_images, tiny_convnext, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from lab import bench, methods

pytestmark = pytest.mark.usefixtures("one_thread")

command = command_of(bench)


def vit(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    return tiny_vit(depth=depth), random_images(32, batch), torch.randint(5, (batch,))


def convnext(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = tiny_convnext(depths=(1, depth))
    return model, random_images(32, batch), torch.randint(5, (batch,))


def llama(depth: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    size = dict(dim=32, depth=depth, heads=4, kv_heads=2, hidden=48, context=32)
    tokens = torch.randint(19, (batch, 9))
    return models.LLaMA(19, **size), tokens[:, :-1], tokens[:, 1:]


TINY = {"vit": (vit, 4), "convnext": (convnext, 4), "llama": (llama, 4)}
FIRST = {"vit": "patch_embed", "convnext": "stem.0", "llama": "embed"}
each_model = pytest.mark.parametrize("name", TINY)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "MODELS", TINY)


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """A model's name → its table's lines, the heading first, each a list of cells."""
    found = {}
    for line in text.splitlines():
        if line.partition(":")[0] in TINY:
            found[line.partition(":")[0]] = lines = []
        elif line.startswith("| ") and "---" not in line:
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def bench_once(*words: str) -> int:
    return command("--depth", 1, "--batch-size", 2, "--rounds", 1, "--device", "cpu", *words)


# ------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("peft", [True, False], ids=["with peft", "without"])
def test_every_model_has_a_table_with_a_row_for_every_method(peft, small, capsys, monkeypatch):
    if peft:
        pytest.importorskip("peft")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert bench_once() == 0
    text = capsys.readouterr().out
    assert text.count("pip install peft") == (not peft)
    assert text.count("as many parameters") == 3
    expected = ["limit", "full", "linear", "ssf", "san", "lora", "dora"]
    expected += ["PEFT's LoRA", "PEFT's IA³"] if peft else []
    tables = tables_of(text)
    assert list(tables) == ["vit", "convnext", "llama"]
    for name, (heading, *rows) in tables.items():
        assert heading == ["method", "step, × full", "× limit"]
        assert [row[0] for row in rows] == expected + (["san+lora"] if name == "llama" else [])
        for method, *cells in rows:
            assert all(float(cell) > 0 for cell in cells), method
        by_method = {row[0]: row[1:] for row in rows}
        assert by_method["full"][0] == by_method["limit"][1] == "1.00"


def test_compile_adds_two_columns_to_the_methods_asked_for(small, capsys, monkeypatch):
    compiled, whole = [], torch.compile

    def without_code(model: nn.Module, **settings) -> nn.Module:
        compiled.append(model)
        return whole(model, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", without_code)
    assert bench_once("--model", "vit", "--methods", "san", "--compile") == 0
    heading, *rows = tables_of(capsys.readouterr().out)["vit"]
    assert heading[3:] == ["compiled, × full", "compiled, × compiled limit"]
    assert [row[0] for row in rows] == ["limit", "full", "san"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    assert len(compiled) == 3


def test_a_method_that_does_not_compile_is_named_and_has_dashes(small, capsys, monkeypatch):
    def step_by_step(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.layer(x)

    monkeypatch.setattr(methods.LoRALayer, "low_rank", step_by_step)
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **k: whole(m, backend="eager", **k))
    assert bench_once("--model", "vit", "--methods", "lora", "--compile") == 0
    text = capsys.readouterr().out
    assert "lora is not compiled: " in text
    assert tables_of(text)["vit"][-1][3:] == ["—", "—"]


@pytest.mark.parametrize("word", ["--depth", "--rounds", "--batch-size"])
def test_nothing_is_measured_zero_times(word, capsys):
    assert command(word, 0) == 2
    assert "above 0" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the limit, and SAN


def prepared(name: str, method: str) -> tuple[nn.Module, nn.Module, Tensor, tuple]:
    """A tiny base, its labels, and what bench makes of it: a model and its inputs' source."""
    torch.manual_seed(0)
    base, inputs, labels = TINY[name][0](2, 2)
    options = argparse.Namespace(**bench.OPTIONS, shift=name != "llama", rank=4)
    return base, inputs, labels, bench.prepared(base, method, inputs, options)


@each_model
def test_the_limit_is_the_loss_and_its_gradient_by_the_first_layers_output_alone(name):
    base, inputs, labels, (model, read) = prepared(name, "limit")
    seen = []
    bench.stepper(model, lambda x: model(seen.append(x) or x), read, labels, amp=False)()
    assert all(p.grad is None for p in model.parameters())

    first = []
    keep = base.get_submodule(FIRST[name]).register_forward_hook(
        lambda *args: first.append(args[2])
    )
    logits = base(inputs).flatten(0, -2)
    keep.remove()
    loss = nn.functional.cross_entropy(logits, labels.flatten())
    (expected,) = torch.autograd.grad(loss, first)
    assert expected.abs().max() > 0
    torch.testing.assert_close(seen[0].grad, expected)


def flops(name: str, method: str) -> int:
    """Of a step's matrix products and convolutions."""
    _, _, labels, (model, read) = prepared(name, method)
    with FlopCounterMode(display=False) as counter:
        bench.stepper(model, model, read, labels, amp=False)()
    return counter.get_total_flops()


@each_model
@pytest.mark.parametrize("method", ["ssf", "san"])
def test_san_adds_no_product_to_the_limit_but_that_of_a_new_head(name, method):
    base = TINY[name][0](2, 2)[0]
    head = 0 if name == "llama" else 2 * 2 * base.head.weight.numel()  # a picture: multiply and add
    assert flops(name, method) == flops(name, "limit") + head
    assert flops(name, "full") > 1.3 * flops(name, "limit")


@each_model
def test_the_adapted_model_compiles_as_one_graph(name):
    _, _, _, (model, read) = prepared(name, "san")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs, expected = compiled(read()), model(read())
    torch.testing.assert_close(outputs, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn_like(outputs)
    for one, other in zip(
        torch.autograd.grad(outputs, trained, weights),
        torch.autograd.grad(expected, trained, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------- methods that bench adapts itself

LINEAR = {
    "vit": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "convnext": ("pwconv1", "pwconv2"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
IN_LLAMA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
LAST = ("fc2", "pwconv2", "down_proj")  # of an MLP: IA³ scales what it reads


def trained_layers(model: nn.Module) -> dict[str, int]:
    """Layer → how many numbers are trained in it."""
    found: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = re.split(r"\.(lora_|ia3_|[abm]$|weight$|bias$)", key)[0]
            found[layer] = found.get(layer, 0) + parameter.numel()
    return found


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "dora")] + [(n, m) for m in bench.PEFT for n in TINY],
)
def test_dora_and_pefts_methods_train_linear_layers_and_a_new_head(name, method):
    if method in bench.PEFT:
        pytest.importorskip("peft")
    base, _, labels, (model, read) = prepared(name, method)

    def numbers(key: str, layer: nn.Linear) -> int:
        outputs, inputs = layer.weight.shape
        if method == "PEFT's IA³":
            return inputs if key.endswith(LAST) else outputs
        return 4 * (inputs + outputs) + (outputs if method == "dora" else 0)

    kinds = IN_LLAMA if name == "llama" and method != "PEFT's IA³" else LINEAR[name]
    expected = {k: numbers(k, m) for k, m in base.named_modules() if k.endswith(kinds)}
    if name != "llama":
        expected["head"] = sum(p.numel() for p in base.head.parameters())
    assert trained_layers(model) == expected
    torch.testing.assert_close(model(read()), base(read()))
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # what is multiplied by zeros at first moves at the second step
        bench.stepper(model, model, read, labels, amp=False)()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


# --------------------------------------------------------------------- the memory of a LLaMA's step

SMALL = dict(vocab=50, dim=16, depth=5, heads=4, kv_heads=2, hidden=24, context=64)
AS_TRAINED = argparse.Namespace(**bench.OPTIONS, shift=False, rank=4, amp=False)


@pytest.mark.parametrize("method", ["san", "lora", "full"])
def test_what_a_step_needs_by_arithmetic_is_what_a_model_with_weights_keeps(method):
    tokens = torch.randint(50, (2, 24))

    def whole(depth: int) -> tuple[models.LLaMA, int]:
        model = models.LLaMA(**SMALL | {"depth": depth})
        methods.adapt(model, method, AS_TRAINED)
        return model, bench.kept(model, tokens, amp=False)

    parts = bench.needs(SMALL, method, torch.float32, tokens, AS_TRAINED)
    (model, activations), (_, less) = whole(5), whole(4)
    trained, count = methods.count(model)
    assert parts["weights"] == 4 * count
    assert parts["gradients"] == 4 * trained and parts["optimiser"] == 8 * trained
    assert parts["activations"] == pytest.approx(activations, rel=0.02)
    # one block whole, and what each reads: 2·24 vectors of 16
    again = activations - 4 * (activations - less) + 5 * 2 * 24 * 16 * 4
    assert parts["activations, --recompute"] == pytest.approx(again, rel=0.05)


def test_frozen_weights_in_bfloat16_take_half_and_none_is_allocated():
    tokens, norms = torch.randint(50, (2, 24)), 11 * 16
    parts = bench.needs(SMALL, "san", torch.bfloat16, tokens, AS_TRAINED)
    frozen = methods.count(models.LLaMA(**SMALL))[1] - norms
    assert parts["weights"] == 2 * frozen + parts["gradients"]
    model = bench.unallocated(bench.LLAMAS["LLaMA-7B"], torch.bfloat16)
    assert methods.count(model)[1] == 6_738_415_616  # as its authors say, 6.7 billion
    assert all(p.untyped_storage().nbytes() <= 4 for p in model.parameters())


def test_memory_prints_a_row_for_every_model_and_method_and_measures_the_smallest(
    monkeypatch, capsys
):
    monkeypatch.setattr(bench, "LLAMAS", {bench.SMOLLM2: SMALL | {"tied": True}, "other": SMALL})
    assert command("--memory", "--batch-size", 2, "--length", 24, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "batch 2, 24 tokens each, the last 16 learned" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head, _, *rows = rows
    assert head == [
        *("model", "method", "frozen weights", "weights", "gradients", "optimiser", "activations"),
        *("sum", "--recompute", "measured"),
    ]
    names = [(bench.SMOLLM2, m) for m in ("san", "lora", "full")]
    assert [tuple(row[:2]) for row in rows] == names + [("other", m) for _, m in names]
    assert [row[2] for row in rows] == ["float32"] * 3 + ["bfloat16", "bfloat16", "float32"]
    assert all(float(row[-1]) >= 0 for row in rows[:3]) and not any(row[-1] for row in rows[3:])
