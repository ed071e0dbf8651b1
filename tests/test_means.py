import pytest
import torch

from measures.means import MAX_ONE_HOT_CLASSES, class_means, class_sums
from run.errors import UserError


def test_class_means_are_about_the_mean_of_all_samples_and_leave_absent_classes_out():
    x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 3.0]]), torch.tensor([0, 0, 2])
    means, counts = class_means([({"layer": x}, y)], num_classes=3)
    assert counts.tolist() == [2, 0, 1]
    assert means["layer"].mu.tolist() == [4, 1]
    assert means["layer"].M.tolist() == [[-2, -1], [0, 0], [4, 2]]


@pytest.mark.parametrize("num_classes", [MAX_ONE_HOT_CLASSES, MAX_ONE_HOT_CLASSES + 1, 1000])
def test_class_sums_are_exact_for_few_and_for_many_classes(num_classes):
    x = torch.randint(-(2**20), 2**20, (300, 7)).float()  # integers, whose sums float64 holds exactly
    y = torch.randint(num_classes, (300,))
    sums, _ = class_sums([({"layer": x}, y)], num_classes)
    expected = torch.stack([x[y == c].double().sum(0) for c in range(num_classes)])
    assert torch.equal(sums["layer"], expected)


@pytest.mark.parametrize("num_classes", [3, 100])
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_labels_of_no_class_are_an_error(num_classes, wrong):
    with pytest.raises(UserError, match=f"outside 0 to {num_classes - 1}"):
        class_means([({"layer": torch.randn(3, 2)}, torch.tensor([0, 1, wrong]))], num_classes)


def test_no_samples_are_an_error():
    with pytest.raises(UserError, match="no sample"):
        class_means([], num_classes=3)
