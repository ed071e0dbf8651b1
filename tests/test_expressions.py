import pytest

from run.expressions import SHORT, Expression, ExpressionError, parse

# text, a word of the sentence, and the place of the mark
WRONG = [
    ("", "must stand here", 0),
    ("   ", "must stand here", 0),
    ("hes(loss, theta)", "perhaps hess", 0),
    ("Hess(loss, theta)", "perhaps hess", 0),
    ("gradient", "perhaps gradients", 0),
    ("(loss)", "not '('", 0),
    ("3", "not '3'", 0),
    ("∇loss", "not '∇'", 0),
    ("loss loss", "nothing may follow", 5),
    ("loss()", "loss takes no '('", 4),
    ("loss[0]", "loss takes no '['", 4),
    ("f", "f needs a layer", 1),
    ("f[0]", "f needs a layer", 1),
    ("f()", "name of a layer is missing", 2),
    ("f( )", "name of a layer is missing", 2),
    ("f(conv1", "')' is missing", 7),
    ("f(conv1))", "nothing may follow", 8),
    ("f(conv 1)", "a name ends with ')'", 6),
    ("f(a, b)", "a name ends with ')'", 3),
    ("f(conv1)[", "an index is", 9),
    ("f(conv1)[]", "an index is", 9),
    ("f(conv1)[a]", "not 'a'", 9),
    ("f(conv1)[-1]", "not '-'", 9),
    ("f(conv1)[1.5]", "',' or ']' must follow", 10),
    ("f(conv1)[1", "',' or ']' must follow", 10),
    ("f(conv1)[1,]", "an index is", 11),
    ("f(conv1)[1] [2]", "nothing may follow", 12),
    ("theta()", "a module or a parameter is missing", 6),
    ("theta[1]", "an index needs a tensor", 0),
    ("theta(fc.weight", "')' is missing", 15),
    ("grad", "'(' must follow grad", 4),
    ("grad()", "must stand here", 5),
    ("grad(loss)", "',' must follow", 9),
    ("grad(loss theta)", "',' must follow", 10),
    ("grad(loss,)", "must stand here", 10),
    ("grad(loss, theta", "')' is missing at the end", 16),
    ("grad(loss, loss)", "not to the loss", 11),
    ("grad(loss, thet)", "perhaps theta", 11),
    ("grad(theta, theta)", "not of theta", 5),
    ("grad(los, theta)", "perhaps loss", 5),
    ("grad(loss, theta, theta)", "only hess takes two", 16),
    ("grad(f(input), theta)", "depends on nothing", 7),
    ("grad(grad(loss, theta), theta)", "none of loss, f", 5),
    ("hess(f(output), theta)", "say which of the outputs", 7),
    ("hess(loss, theta, f(fc))", "both of theta", 20),
    ("hess(loss, f(fc), theta)", "both of theta", 13),
    ("hess(loss, theta, theta, theta)", "')' is missing at the end", 23),
    ("hess(loss, theta(fc)) + 1", "nothing may follow", 22),
    ("hess loss", "'(' must follow hess", 5),
    ("hessian(loss)", "none of", 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words", "place"), WRONG, ids=[text or "nothing" for text, _, _ in WRONG])
def test_what_is_wrong_is_said_in_a_sentence_with_a_mark_under_the_place(text, words, place):
    with pytest.raises(ExpressionError) as error:
        parse(text)
    sentence, shown, mark = str(error.value).split("\n")
    assert words in sentence
    assert shown.strip() == " ".join(text.split())
    assert mark.index("^") - 4 == place


def test_of_a_long_expression_what_is_around_the_mistake_is_shown():
    with pytest.raises(ExpressionError) as error:
        parse(f"grad(loss, theta({'a' * 500}) )x")
    _, shown, mark = str(error.value).split("\n")
    assert len(shown) < 140 and shown[mark.index("^")] == "x"


@pytest.mark.parametrize(
    ("text", "column", "math"),
    [
        ("loss", "loss", "L"),
        ("f(layer4.1)", "f-layer4.1", r"f^{\mathrm{layer4.1}}"),
        ("f(relu:1)[5]", "f-relu-1-5", r"f^{\mathrm{relu:1}}_{5}"),
        ("theta", "theta", r"\theta"),
        ("theta(fc.weight)[2, 7]", "theta-fc.weight-2-7", r"\theta_{\mathrm{fc.weight}, 2,7}"),
        ("theta(layer1.*)", "theta-layer1.", r"\theta_{\mathrm{layer1.*}}"),
        ("grad(loss, theta(fc))", "grad-loss-theta-fc", r"\nabla_{\theta_{\mathrm{fc}}} L"),
        ("grad(f(output), f(input))", "grad-f-output-f-input", r"\partial f / \partial x"),
        ("grad(f(output), theta)", "grad-f-output-theta", r"\partial f / \partial \theta"),
        ("hess(loss, theta)", "hess-loss-theta", r"\nabla^2_{\theta} L"),
        (
            "hess(loss, theta(a_b), theta(fc))",
            "hess-loss-theta-a_b-theta-fc",
            r"\nabla^2_{\theta_{\mathrm{a\_b}} \theta_{\mathrm{fc}}} L",
        ),
        ("hess(f(output)[3], f(input))", "hess-f-output-3-f-input", r"\nabla^2_{x} f_{3}"),
    ],
)
def test_an_expression_has_a_column_a_form_in_tex_and_reads_back_as_itself(text, column, math):
    expression = parse(text)
    assert isinstance(expression, Expression)
    assert expression.column == column
    assert expression.math == f"${math}$"
    assert str(expression) == text
    assert parse(str(expression)) == expression


def test_spaces_mean_nothing():
    assert parse("  hess( loss ,theta( fc ) [ 1 ,2 ] )") == parse("hess(loss, theta(fc)[1,2])")


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_stays_itself(name):
    assert parse(f" {name} ") == name


def test_matplotlib_can_draw_every_form():
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("agg")
    for text in ("hess(loss, theta(a_b.c))", "f(relu:1)[5]", "grad(f(output)[3], f(input)[0, 1])", "theta(layer1.*)"):
        parser.parse(parse(text).math)
