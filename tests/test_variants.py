"""lab/variants.py: what each change to SAN computes, and that it still merges."""

import argparse
import copy

import pytest
import torch
from tiny import random_images, tiny_vit

import san
from lab import methods, variants

ARGS = argparse.Namespace(wiring="san", mode="both", shift=True, norms=True, gamma_std=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(change):
    """A base, the same adapted with SAN and changed, and pictures."""
    base = tiny_vit().double()
    model = copy.deepcopy(base)
    methods.adapt(model, "san", ARGS)
    change(model)
    return base, model, random_images(32).double()


@pytest.mark.parametrize("change", variants.CHANGES.values(), ids=[*variants.CHANGES])
def test_a_change_starts_at_the_base_and_merges(change):
    base, model, images = adapted(change)
    assert torch.allclose(model(images), base(images), atol=1e-12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    trained = model(images)
    assert not torch.allclose(trained, base(images), atol=1e-6)
    san.merge(model)
    assert torch.allclose(model(images), trained, atol=1e-10)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_exponential_trains_the_logarithm():
    _, model, images = adapted(variants.exponential)
    layer = model.get_submodule("blocks.0.mlp.fc1")
    trained = layer.parametrizations.gamma.original
    assert not trained.any() and (layer.gamma == 1).all()
    model(images).square().mean().backward()
    with torch.no_grad():
        trained -= 3
    assert torch.allclose(layer.gamma, torch.full_like(trained, -3).exp())


def test_pulled_adds_the_gradient_of_a_penalty():
    _, plain, images = adapted(lambda model: None)
    _, model, _ = adapted(variants.pulled)
    for one in (plain, model):
        with torch.no_grad():
            for layer in variants.san_layers(one).values():
                layer.gamma.fill_(1.5)
        one(images).square().mean().backward()
    for layer, same in zip(
        variants.san_layers(model).values(), variants.san_layers(plain).values()
    ):
        added = layer.gamma.grad - same.gamma.grad
        assert torch.allclose(added, torch.full_like(added, variants.PULL * 0.5))


def test_propagated_in_mlps_leaves_one_reader_per_block():
    _, model, _ = adapted(variants.propagated_in_mlps)
    readers = [name for name, layer in variants.san_layers(model).items() if layer.anterior]
    assert readers == [f"blocks.{i}.mlp.fc2" for i in range(len(model.blocks))]
