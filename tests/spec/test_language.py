"""What a spec's text may say, and how what is wrong is pointed at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property import law
from ucp.errors import BadArgument, Position, SpecError, UcpError
from ucp.spec import arithmetic, grammar, patterns
from ucp.spec.bound import bind
from ucp.spec.check import check_names, words
from ucp.spec.language import load, loads, unused_sizes
from ucp.spec.positions import SpecText

HERE = Position("spec.yaml", 7, 12)


def source(text: str) -> SpecText:
    return SpecText(text, HERE)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a", "a"),
        ("  a   b ", "a b"),
        ("((a)) (b c)", "a (b c)"),
        ("(a b)/tp", "(a b)/tp"),
        ("(a|b c|2)", "(a | b c | 2)"),
        ("((a | b) c)/tp/dp d", "((a | b) c)/tp/dp d"),
        ("( vocab + pad ) / tp hidden", "(vocab+pad)/tp hidden"),
        ("repeat(kv)/tp", "repeat(kv)/tp"),
        ("repeat(kv q)/tp", "repeat(kv q)/tp"),
        ("average((a/tp b) c, dp)", "average((a/tp b) c, dp)"),
        ("scalar", "scalar"),
    ],
)
def test_an_expression_has_one_spelling(text: str, canonical: str) -> None:
    tree = grammar.parse(source(text))
    assert str(tree) == canonical
    assert str(grammar.parse(source(canonical))) == canonical


@pytest.mark.parametrize(
    ("text", "column", "marks", "message"),
    [
        ("", 12, "^", "the expression is empty; a tensor without dimensions is 'scalar'"),
        ("a | b", 14, "  ^", "'|' stands only inside brackets"),
        ("(a", 14, "  ^", "expected ')' to close the '(' in column 12, found the end"),
        ("a)", 13, " ^", "this ')' closes nothing"),
        ("()", 13, " ^", "expected an axis (a name, a number or a bracket), found ')'"),
        ("(a | )", 17, "     ^", "expected an axis"),
        ("a/tq b", 14, "  ^^", "'tq' is no mesh dimension; known are"),
        ("a/ b", 15, "   ^", "'b' is no mesh dimension"),
        ("/tp", 12, "^", "'/' follows the axis that it cuts"),
        ("tp a", 12, "^^", "'tp' is a mesh dimension and stands behind '/'"),
        ("a pad", 14, "  ^^^", "'pad' is a word of the language"),
        ("3/tp", 12, "^^^^", "a number can't be cut"),
        ("a 0", 14, "  ^", "an axis of size 0; sizes are whole numbers from 1"),
        ("a/tp b/tp", 17, "     ^^^^", "tp cuts another axis of this product already"),
        ("(a/tp | b) c/tp", 23, "           ^^^^", "tp cuts another axis of this product already"),
        ("(a/tp b)/dp", 13, " ^^^^", "'a/tp' is cut inside the cut '(a/tp b)/dp'"),
        ("a/tp/tp", 12, "^^^^^^^", "'a/tp/tp' is cut over tp twice"),
        ("((a+pad) b)", 13, " ^^^^^^^", "a padded axis must be a whole dimension"),
        ("(a b+pad)", 13, " ^^^", "only a name can be padded"),
        ("(a+b)", 15, "   ^", "only 'pad' can be added"),
        ("repeat(a) b", 12, "^^^^^^^^^", "repeat(...) says which ranks hold copies, so it must be cut"),
        ("average(a)", 21, "         ^", "expected ',' before the mesh dimension of average"),
        ("average(a/tp, tp)", 20, "        ^^^^", "copies over tp are averaged, so nothing is cut over it"),
        ("a, b", 13, " ^", "',' stands only in average(axes, dimension)"),
        ("a-b", 13, " ^", "'-' has no meaning here"),
        ("(" * 60 + "a" + ")" * 60, 62, " " * 50 + "^", "brackets are nested more than 50 deep"),
    ],
)
def test_expressions_that_are_refused(text: str, column: int, marks: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        grammar.parse(source(text))
    assert str(caught.value).startswith(f"spec.yaml:7:{column}: ")
    assert message.replace("a name, a number or a bracket", "name, number or bracket") in str(caught.value)
    assert caught.value.picture == f"    {text}\n    {marks}"


def column_of_refusal(parse: Callable[[SpecText], object], text: str) -> int:
    """Where the text is refused; its beginning if it is not."""
    try:
        parse(source(text))
    except SpecError as error:
        return error.position.column
    return HERE.column


@given(st.text(alphabet="ab12 ()|/+,tpde{}*.'\"-=", max_size=30))
@law(300)
def test_no_text_is_worse_than_refused(text: str) -> None:
    """Every text is read or refused with a place inside it; nothing else is ever raised."""
    for parse in (grammar.parse, arithmetic.parse, patterns.parse, patterns.template):
        assert 12 <= column_of_refusal(parse, text) <= 12 + len(text)


@given(st.text(alphabet='uc:p 1\n"{}[]-model&*!#|>\tparameters%', max_size=60))
@law(300)
def test_no_file_is_worse_than_refused(text: str) -> None:
    with pytest.raises(SpecError):
        loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("config.a / 4", 3),
        ("config.a // 5 + 1", 3),
        ("2 * (config.a - 2)", 20),
        ("-config.a + 20", 8),
        ("config.none or config.a", 12),
        ("config.null or 3", 3),
        ("config.text.deep", 5),
        ("config.a - 2 - 3", 7),
        ("config.float", 8),
    ],
)
def test_arithmetic(text: str, value: int) -> None:
    spec = loads(f"ucp: 1\nmodel: x\nsizes: {{n: {text}}}\nparameters: {{w: n}}\n")
    config = {"a": 12, "null": None, "text": {"deep": 5}, "float": 8.0}
    assert bind(spec, config).sizes == {"n": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config.a / 5", "12 / 5 leaves a remainder of 2"),
        ("config.a / 0", "12 is divided by zero"),
        ("config.a +", r"expected a name, a number or '\(', found the end"),
        ("(config.a", "expected '\\)', found 'the end'"),
        ("config.a config.b", "'config.b' was not expected here"),
        ("config.a ** 2", "found '\\*'"),
        ("__import__('os')", "'\\(' was not expected here"),
        ("other + 1", "'other' is no size of this spec"),
        ("n + 1", "the size 'n' needs itself: n → n"),
        ("config.a - 20", "the size 'n' is -8; a size is a whole number from 0"),
        ("config.word", "the size 'n' is 'many'"),
        ("config.word * 2", "arithmetic needs whole numbers, and this is 'many'"),
        ("config.list", "'config.list' is no number"),
        ("config.aa", "the model's config has no 'aa'"),
        ("config.null", "'config.null' is null"),
        ("config.a * 9999999999999999999", "too large"),
    ],
)
def test_arithmetic_that_is_refused(text: str, message: str) -> None:
    config = {"a": 12, "word": "many", "list": [1], "null": None}
    with pytest.raises(SpecError, match=message):
        bind(loads(f"ucp: 1\nmodel: x\nsizes:\n  n: {text}\nparameters: {{w: n}}\n"), config).find("w")


RIGHT = """\
ucp: 1
model: x
sizes:
  a: config.a
parameters:
  w: a
"""


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (RIGHT.replace("ucp: 1", "ucp: 2"), "1:6", "version 2 of the language; this program reads version 1"),
        (RIGHT.replace("model: x\n", ""), "1:1", "the spec has no 'model:'"),
        (RIGHT.replace("sizes", "size"), "3:1", "'size' is no part of a spec; did you mean 'sizes'"),
        (RIGHT + "  w: a\n", "7:3", "'w' is given twice in parameters:, first in line 6"),
        (RIGHT.replace("w: a", "w: b"), "6:6", "'b' is no size of this spec"),
        (RIGHT.replace("w: a", 'w: "(b a)"'), "6:8", "'b' is no size of this spec"),
        (
            RIGHT.replace("a: config.a", "tp: config.a"),
            "4:3",
            "'tp' is a word of the language",
        ),
        (RIGHT.replace("w: a", "w: {when: config.a}"), "6:6", "'w' has no 'axes:'"),
        (RIGHT.replace("w: a", "w: {axes: a, else: a}"), "6:22", "'else' of 'w' needs a 'when'"),
        (RIGHT.replace("w: a", "w: {axes: a, if: a}"), "6:16", "'if' is no part of 'w'"),
        (RIGHT.replace("w: a", "w: {axes: a, optional: 1}"), "6:26", "optional is true or false"),
        (RIGHT.replace("w: a", "w: {axes: a, when: b}"), "6:22", "'b' is neither a size nor a key of the config"),
        (RIGHT.replace("w: a", "w: [a]"), "6:6", "an expression must be a text"),
        (RIGHT.replace("w: a", "w..v: a"), "6:3", "a name's parts can't be empty"),
        (RIGHT.replace("w: a", '"w.{}": a'), "6:6", "a capture is {name}"),
        (RIGHT.replace("w: a", '"w.{a/tt}": a'), "6:9", "'tt' is no mesh dimension"),
        (RIGHT + "tied: {v: 'w.{i}'}\n", "7:14", "nothing captures 'i'"),
        (RIGHT + "tied: {v: 'w.*'}\n", "7:14", "'*' can't be filled in"),
        (RIGHT + "tied: {v: {when: config.a}}\n", "7:11", "'v' has no 'to:'"),
        (RIGHT + "names: {f: {v: {from: [w, w]}}}\n", "7:16", "is made of several parameters and has no 'as:'"),
        (RIGHT + "names: {f: {v: {from: w, as: b}}}\n", "7:30", "'b' is no size of this spec"),
        (RIGHT + "names: {f: {v: {from: w, as: a, stack: {i: b}}}}\n", "7:13", "stack: 'b' is no size of this spec"),
        (RIGHT + "layouts: {autotp: {w: c}}\n", "7:23", "'c' is no size of this spec"),
        ("a: [", "1:5", "not YAML"),
        ("", "1:1", "a spec is empty"),
        ("[" * 3000, "1:1", "nested too deep"),
        (RIGHT + "defaults: {a: 2001-01-01}\n", "7:15", "a default must be a number, true, false, null or a text"),
        (RIGHT + "defaults: {a: !!int x}\n", "7:15", "'x' can't be read as int"),
        ("- a", "1:1", "a spec must be a mapping"),
        ("ucp: 1\nmodel: x\nparameters:\n  w: a\n", "4:6", "'a' has no size; add it under sizes:"),
    ],
)
def test_files_that_are_refused(text: str, place: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        loads(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml:{place}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_constructed_from_yaml(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = f"ucp: 1\nmodel: x\ndefaults: {{a: !!python/object/apply:os.mkdir ['{mark}']}}\nparameters: {{w: '3'}}\n"
    with pytest.raises(SpecError, match="a default must be a number, true, false, null or a text"):
        loads(text)
    with pytest.raises(
        UcpError, match=r"a default must be .* and this is tag:yaml\.org,2002:python/object/apply:os\.mkdir"
    ):
        loads(text.replace("['" + str(mark) + "']", "x"))
    assert not mark.exists()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8 text"):
        load(tmp_path / "binary.yaml")


def test_conditions_choose_lines() -> None:
    spec = loads(
        "ucp: 1\nmodel: x\ndefaults: {gated: false}\nparameters:\n"
        "  up: {axes: '(2 3)', when: config.gated, else: '3'}\n  bias: {axes: '3', when: not config.gated}\n"
        "  kind: {axes: '4', when: config.kind == 'new' and config.gated != false}\n"
    )
    plain, gated = bind(spec, {"kind": "new"}), bind(spec, {"gated": True, "kind": "new"})
    assert [(str(a.pattern), str(a.expression)) for a in plain.lines] == [("up", "3"), ("bias", "3")]
    assert [(str(a.pattern), str(a.expression)) for a in gated.lines] == [("up", "(2 3)"), ("kind", "4")]
    with pytest.raises(SpecError, match="the model's config has no 'kind'"):
        bind(spec, {"gated": True})


def test_settings_go_before_the_config() -> None:
    spec = loads("ucp: 1\nmodel: x\nsizes: {a: config.a, b: 2 * a, c: config.c}\nparameters: {w: a b c}\n")
    assert bind(spec, {"a": 3, "c": 4}).sizes == {"a": 3, "b": 6, "c": 4}
    assert bind(spec, {"a": 3, "c": 4}, {"a": 5, "config.c": 7}).sizes == {"a": 5, "b": 10, "c": 7}
    bound = bind(spec, {"a": 3})
    assert (dict(bound.sizes), list(bound.absent)) == ({"a": 3, "b": 6}, ["c"])
    with pytest.raises(SpecError, match="'w' needs 'c', and the model's config has no 'c'; give it with --set"):
        bound.find("w")
    with pytest.raises(BadArgument, match=r"--set d: .* has no size 'd'"):
        bind(spec, {}, {"d": 1})


def test_a_layouts_lines_go_first() -> None:
    text = RIGHT + "layouts:\n  autotp:\n    '*': a/tp\n"
    plain, other = (bind(loads(text), {"a": 4}, layout=name) for name in (None, "autotp"))
    assert [str(b.find("w").expression) for b in (plain, other)] == ["a", "a/tp"]  # type: ignore[union-attr]


def test_unused_sizes() -> None:
    text = RIGHT.replace("  a: config.a\n", "  a: b\n  b: config.b\n  c: '2'\n  d: '3'\n  e: '4'\n")
    text += "  'x.{d/ep}': '2'\nnames: {f: {v: {from: w, as: e}}}\n"
    assert unused_sizes(loads(text)) == ("c",)


def test_numbered_captures_and_experts() -> None:
    pattern = patterns.parse(source("m.{i}.x*.{e}.w{i}"))
    assert pattern.match("m.3.xyz.7.w3") == {"i": 3, "e": 7}
    assert pattern.match("m.3.xyz.7.w4") is None
    assert pattern.match("m.3.x.y.7.w3") is None
    assert pattern.match("m.a.x.7.w3") is None
    assert patterns.template(source("h.{i-2}.{e+1}")).fill({"i": 5, "e": 1}) == "h.3.2"
    assert patterns.template(source("h.{i-2}")).fill({"i": 1}) is None
    spec = loads("ucp: 1\nmodel: x\nsizes: {experts: config.e}\nparameters: {'m.{i}.{experts/ep}.w': '2 3'}\n")
    bound = bind(spec, {"e": 4})
    (line,) = bound.lines
    assert words(line.pattern, line.expression) == "unique to a rank of ep"
    shapes = {f"m.0.{e}.w": (2, 3) for e in range(4)}
    assert check_names(bound, shapes).problems == ()
    (problem,) = check_names(bound, {**shapes, "m.0.4.w": (2, 3)}).problems
    assert "'m.0.4.w' is number 4 of 'experts', which is 4" in str(problem)


def test_what_a_check_of_names_finds() -> None:
    text = RIGHT + "  gone: a\n  may: {axes: a, optional: true}\ntied: {v: w, u: gone}\n"
    bound = bind(loads(text, "my.yaml"), {"a": 4})
    report = check_names(bound, {"w": (5,), "b": (3,), "x": (2,)}, ["b"], {"v": "w"})
    assert [str(p) for p in report.problems] == [
        "my.yaml:1:1: no line under parameters: matches 'v' (shape [5]); write one",
        "my.yaml:6:6: 'a' is 4 (a 4), but 'w' has 5 in dimension 0",
        "my.yaml:1:1: no line under parameters: matches 'x' (shape [2]); write one",
        "my.yaml:7:3: 'gone' matches no parameter; mend it, take it out or mark it optional",
    ]
    assert report.absent == ("may",)
    text = RIGHT + "  v: a\ntied: {v: w}\n"
    both = {"w": (4,), "v": (4,)}
    (problem,) = check_names(bind(loads(text, "my.yaml"), {"a": 4}), both).problems
    assert "'v' is tied to 'w' by the spec, but both are parameters of their own here" in str(problem)
    (problem,) = check_names(bind(loads(RIGHT + "  v: a\n", "my.yaml"), {"a": 4}), {"w": (4,)}, (), {"v": "w"}).problems
    assert "'v' is tied to 'w' in the checkpoint, and nothing under tied: says so" in str(problem)
