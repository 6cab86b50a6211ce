"""Dropout's zeros drawn one by one: each entry falls by itself, with its probability."""

import numpy as np
import pytest
import torch

from llmkd.models.dropout import drawn, places, without, zero_


def fallen(count: int, p: float, times: int) -> np.ndarray:
    """(times, count) of bool"""
    torch.manual_seed(0)
    found = np.zeros((times, count), bool)
    for row in found:
        row[places(count, p).numpy()] = True
    return found


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.99])
def test_each_entry_falls_with_its_probability_wherever_it_stands(p: float) -> None:
    count, times = 40, 4000
    found, spread = fallen(count, p, times), np.sqrt(p * (1 - p))
    assert np.abs(found.mean(0) - p).max() <= 5 * spread / np.sqrt(times)
    assert abs(found.mean() - p) <= 5 * spread / np.sqrt(found.size)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_neighbours_fall_independently(p: float) -> None:
    found = fallen(200, p, 2000)
    for distance in (1, 2, 7):
        both = (found[:, distance:] & found[:, :-distance]).mean()
        assert abs(both - p * p) <= 6 * np.sqrt(p * p / found[:, distance:].size)


def test_as_many_fall_as_of_a_binomial() -> None:
    counts = fallen(500, 0.1, 4000).sum(1)
    assert abs(counts.mean() - 50) <= 5 * np.sqrt(45 / 4000)
    assert counts.var() == pytest.approx(45, rel=0.12)


@pytest.mark.parametrize("p", [1e-30, 1e-12, 0.3, 1 - 1e-6])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_places_rise_and_lie_inside(count: int, p: float) -> None:
    torch.manual_seed(1)
    found = places(count, p)
    assert found.dtype == torch.long
    assert (found.diff() > 0).all()
    assert ((found >= 0) & (found < count)).all()


def test_draws_go_on_where_they_were_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkd.models.dropout.math.ceil", lambda expected: -7)  # one at a time
    assert fallen(300, 0.3, 200).mean() == pytest.approx(0.3, abs=0.02)


def test_a_seed_gives_the_same_places() -> None:
    first, second = ((torch.manual_seed(5), drawn(torch.zeros(30, 40), 0.1))[1] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, drawn(torch.zeros(30, 40), 0.1))


@pytest.mark.parametrize("turned", [False, True])
def test_places_and_a_mask_leave_the_same(turned: bool) -> None:
    x = torch.randn(5, 6).T if turned else torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.4
    expected, before = x * ~mask, x.clone()
    for dropped in (mask, mask.flatten().nonzero().flatten()):
        assert torch.equal(without(x, dropped), expected)
        assert torch.equal(zero_(x.contiguous().clone(), dropped), expected)
    assert torch.equal(x, before)
