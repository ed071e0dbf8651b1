import pytest

import flags
from flags import get_args
from run import values

NUMERIC = {
    action.option_strings[-1]: action
    for action in flags._build_parser()._actions
    if action.type and action.dest not in ("look", "look_parts")
}


EXTREMES = ["0", "-0.0", "1e-320", "1e300", "-1e300", "nan", "inf", "-1", "9" * 400]


@pytest.mark.parametrize("text", EXTREMES, ids=[text[:8] for text in EXTREMES])
@pytest.mark.parametrize("flag", NUMERIC)
def test_an_extreme_number_is_a_finite_value_or_refused_in_a_sentence_with_the_flag(flag, text, capsys):
    count = NUMERIC[flag].nargs if isinstance(NUMERIC[flag].nargs, int) else 1
    argv = [flag, *[text] * count] if count > 1 else [f"{flag}={text}"]
    try:
        value = getattr(get_args(argv), NUMERIC[flag].dest)
    except SystemExit as end:
        told = capsys.readouterr().err
        assert end.code == 2 and flag in told and told.count("\n") == 1 and len(told) < 300
    else:
        for item in value if isinstance(value, list) else [value]:
            assert 0 <= float(item) <= values.MAX_RATE and not str(item).startswith("-")


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("--learning-rate", {"1e-320"}),
        ("--dib-lr", {"1e-320"}),
        ("--weight-decay", {"0", "-0.0", "1e-320"}),
        ("--cache-gb", {"0", "-0.0", "1e-320"}),
        ("--warmup", {"0", "-0.0", "1e-320"}),
        ("--momentum", {"0", "-0.0", "1e-320"}),
        ("--betas", {"0", "-0.0", "1e-320"}),
        ("--end-factor", {"0", "-0.0", "1e-320"}),
        ("--bias-lr-scale", set()),
        ("--whiten-epochs", {"0"}),
        ("--seed", {"0"}),
        ("--limit", set()),
        ("--batch-size", set()),
        ("--devices", set()),
    ],
)
def test_which_extreme_numbers_a_flag_takes(flag, allowed):
    taken = set()
    for text in EXTREMES:
        try:
            NUMERIC[flag].type(text)
        except flags.argparse.ArgumentTypeError:
            continue
        taken.add(text)
    assert taken == allowed
