"""lab/loop.py: what a training loop does that no whole run shows."""

from argparse import Namespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lab import loop


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [loop.rate_at(step, steps=100, warmup=10, peak=1.0) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3


def test_the_average_counts_every_step_less_than_the_next():
    def train(average: float) -> tuple[nn.Linear, list[torch.Tensor]]:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
        model, before = nn.Linear(3, 1), []

        def loss_of(model: nn.Linear, batch: tuple) -> torch.Tensor:
            before.append(model.weight.detach().clone())
            return (model(batch[0]) - batch[1]).square().mean()

        args = Namespace(epochs=2, warmup_epochs=0, lr=0.1, weight_decay=0, seed=0, amp=False)
        loop.fit(model, DataLoader(data, 4), loss_of, None, args, average=average)
        return model, before

    last, before = train(average=0.0)
    after = [*before[1:], last.weight.detach()]  # each of the six steps
    mean = after[0]
    for weight in after[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(train(average=0.5)[0].weight.detach(), mean)
    assert not torch.allclose(mean, last.weight)
