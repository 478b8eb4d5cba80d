"""lab/loop.py: what a training loop does that no whole run shows."""

from lab import loop


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [loop.rate_at(step, steps=100, warmup=10, peak=1.0) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == 0.1 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3
