import pytest

from flags import get_args
from run.epochs import epochs_to_measure


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-e", "4"], {0, 1, 2, 3, 4}),
        (["-e", "7", "--measure-every", "3"], {0, 3, 6, 7}),
        (["-e", "50", "--measure-at", "0", "10"], {0, 10}),
        (["-e", "100", "--measure-at", "log:4"], {0, 1, 10, 100}),
        (["-e", "1", "--measure-at", "log:9"], {0, 1}),
        (["-m", "ResNet", "-d", "CIFAR10", "-e", "2", "--measure-every", "1"], {0, 1, 2}),  # not the preset's
    ],
)
def test_epochs_to_measure(argv, expected):
    assert epochs_to_measure(get_args(argv)) == expected
