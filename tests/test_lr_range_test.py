"""The learning-rate range test: smooths without bias, chooses below the minimum, refuses to guess."""

import math

import pytest

from run.errors import UserError
from run.lr_range_test import STEPS, chosen_rate, diverged, smoothed


def rates(low=1e-6, high=10.0):
    return [low * (high / low) ** (k / (STEPS - 1)) for k in range(STEPS)]


def test_smoothing_leaves_a_constant_as_it_is():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_smoothing_by_hand():
    # s_0 = 1; s_1 = (0.9·0.1·1 + 0.1·2) / (1 − 0.81)
    assert smoothed([1.0, 2.0], beta=0.9) == pytest.approx([1.0, 0.29 / 0.19])


def test_a_tenth_of_the_rate_at_the_minimum_is_chosen():
    curve = [1 + (math.log10(rate) + 1) ** 2 for rate in rates()]  # lowest at 0.1
    assert chosen_rate(rates(), curve) == pytest.approx(0.01, rel=0.1)  # the ladder's steps are 18% wide


def test_the_chosen_rate_has_three_digits_so_that_what_is_printed_is_what_is_used():
    rate = chosen_rate(rates(), [1 + (math.log10(rate) + 1.05) ** 2 for rate in rates()])
    assert rate == float(f"{rate:.3g}")


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        ([5.0 - 0.04 * k for k in range(STEPS)], "still falls"),
        ([1.0] * STEPS, "does not fall"),
        ([1.0 + k for k in range(STEPS)], "does not fall"),
        ([math.nan] * STEPS, "does not fall"),
    ],
)
def test_without_a_minimum_inside_the_range_nothing_is_chosen(curve, reason):
    with pytest.raises(UserError, match=f"--lr-range-test: the loss {reason}"):
        chosen_rate(rates(), curve)


def test_divergence_is_a_loss_far_above_the_lowest_or_none_at_all():
    assert not diverged([2.0, 1.0, 1.2])
    assert diverged([2.0, 1.0, math.nan])
    assert diverged([1.0] * 20 + [9.0] * 20)
