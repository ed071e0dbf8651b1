"""Thresholds with full precision and greedy covers, each against a slow independent one."""

import doctest
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

import cover as module
from cover import ROUNDING, calibrated, covers, greedy_cover, similarities, thresholds, unit

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


def blobs(num, d=6, num_classes=3, spread=0.6, seed=0, label_noise=0.0):
    """Features that lie around a direction of their class, and labels, some of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, d, generator=torch.Generator().manual_seed(1))
    y = torch.randint(num_classes, (num,), generator=generator)
    h = centres[y] + spread * torch.randn(num, d, generator=generator)
    wrong = torch.rand(num, generator=generator) < label_noise
    return h, torch.where(wrong, torch.randint(num_classes, (num,), generator=generator), y)


def by_loops(s, y, label):
    """Thresholds, from their definition, number by number."""
    t = []
    for j, c in enumerate(label.tolist()):
        others = [s[i, j].item() for i in range(len(y)) if y[i] != c]
        own = [s[i, j].item() for i in range(len(y)) if y[i] == c and s[i, j].item() > max(others, default=-math.inf)]
        t.append(min(own, default=math.inf))
    return t


@quick
@given(st.integers(0, 20), st.integers(0, 8), st.integers(1, 4), seeds)
def test_thresholds_are_those_of_the_definition(num, num_slots, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randint(-8, 9, (num, num_slots), generator=generator) / 8  # few values, so that many are equal
    y = torch.randint(num_classes, (num,), generator=generator)
    label = torch.randint(num_classes, (num_slots,), generator=generator)
    before = s.clone()
    assert thresholds(s, y, label).tolist() == by_loops(s, y, label)
    assert torch.equal(s, before)


@quick
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 20), st.integers(1, 3), seeds)
def test_calibration_has_precision_one_in_whatever_parts_and_blocks(num, num_slots, split, block, seed):
    z, y = blobs(num, seed=seed % 1000, label_noise=0.2)
    z, W, label = unit(z), torch.randn(num_slots, 6), torch.arange(num_slots) % 3
    parts = list(zip(z.split(split), y.split(split), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLOTS_AT_ONCE", block)
        patch.setattr(module, "ROWS_AT_ONCE", split + 1)
        t, covered = calibrated(parts, W, label)
    s = similarities(z, W)
    assert torch.allclose(t, thresholds(s, y, label, ROUNDING) - ROUNDING / 2, rtol=0, atol=ROUNDING / 4)
    assert torch.equal(torch.cat(covered), s >= t[None])  # not one of another class reaches a threshold
    assert torch.equal(torch.cat(covered), covers(s, y, label, t))


@quick
@given(st.integers(0, 40), st.integers(0, 12), st.integers(1, 3), seeds)
def test_greedy_cover_is_the_one_that_counts_all_gains_anew(num, num_columns, least, seed):
    generator = torch.Generator().manual_seed(seed)
    covered = torch.rand(num, num_columns, generator=generator) < 0.3
    chosen, gains, rest = [], [], covered.clone()
    while num_columns and int(rest.sum(0).max()) >= least:
        gains.append(int(rest.sum(0).max()))
        chosen.append(rest.sum(0).tolist().index(gains[-1]))
        rest[covered[:, chosen[-1]]] = False
    found, found_gains = greedy_cover(covered, least)
    assert (found.tolist(), found_gains.tolist()) == (chosen, gains)


def test_greedy_cover_is_within_a_fifth_of_the_smallest_one():
    z, y = blobs(1000, seed=3, label_noise=0.05)
    z = unit(z)
    _, (covered,) = calibrated([(z, y)], z, y)
    constraint = LinearConstraint(csr_array(covered.numpy().astype(float)), lb=1)  # every sample by some slot
    ones = np.ones(1000)
    smallest = milp(ones, constraints=constraint, integrality=ones, bounds=Bounds(0, 1))
    chosen, gains = greedy_cover(covered)
    assert smallest.success and gains.sum() == 1000
    assert len(chosen) <= 1.2 * smallest.fun
    assert len(chosen) > 1  # else there would be nothing to choose


def test_greedy_cover_of_a_large_set_takes_seconds():
    covered = torch.zeros(60_000, 1800, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for j, start in enumerate(torch.randint(59_000, (1800,), generator=generator).tolist()):
        covered[start : start + 1 + j // 9, j] = True
    start = time.process_time()
    chosen, gains = greedy_cover(covered)
    assert time.process_time() - start < 10  # of CPU time: about 1 on one core of 2025
    assert gains.sum() == covered.any(1).sum() and len(chosen) > 500


def test_examples_by_hand_are_right():
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0
