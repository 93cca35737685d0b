"""The script as a file that is read from the top: its order, the length of its functions."""

import ast
import inspect
import re
from collections import Counter

import pytest
from conftest import ROOT, t

SOURCE = (ROOT / "train_gpt_mlx_kl.py").read_text(encoding="utf-8")
BANNER = re.compile(r"^# =+\n# ([A-Z][A-Z ]+)[:\n]", re.M)


def sections(source):
    """[(title, first line)] by the banners."""
    return [(m[1], source.count("\n", 0, m.start()) + 1) for m in BANNER.finditer(source)]


def later_uses(source):
    """'line: name, defined in SECTION' for each name that a section uses before it is defined."""
    starts = sections(source)

    def section_of(line):
        return sum(line >= start for _, start in starts)

    tree, defined = ast.parse(source), {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if hasattr(n, "id")]
        else:
            names = []
        for name in names:
            defined.setdefault(name, section_of(node.lineno))
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Store):
            continue
        if defined.get(node.id, 0) > section_of(node.lineno):
            wrong.append(f"{node.lineno}: {node.id}, defined in {starts[defined[node.id] - 1][0]}")
    return wrong


def test_no_section_uses_what_a_later_one_defines():
    assert len(sections(SOURCE)) >= 15
    assert later_uses(SOURCE) == []


def test_no_name_is_defined_twice():
    names = re.findall(r"^(?:def |class )?([A-Za-z_]\w*)(?=\(|:| = )", SOURCE, re.M)
    assert len(names) > 200
    assert [name for name, count in Counter(names).items() if count > 1 and name != "if"] == []


def test_a_later_definition_would_be_seen():
    bar = "# " + "=" * 98
    code = "def early(x: Late) -> int:\n    return late(x)\n"
    late = "class Late:\n    pass\n\ndef late(x):\n    return x\n"
    found = later_uses(f"{bar}\n# ONE: a\n{bar}\n{code}\n{bar}\n# TWO: b\n{bar}\n{late}")
    assert [line.split(": ")[1] for line in sorted(found)] == [
        "Late, defined in TWO", "late, defined in TWO"]  # fmt: skip


def test_the_map_names_the_sections_in_their_order():
    titles = [title for title, _ in sections(SOURCE)]
    named = re.findall(r"^    ([A-Z][A-Z ]+?)  +\S", ast.get_docstring(ast.parse(SOURCE)), re.M)
    assert named == titles


def test_no_function_is_longer_than_a_screen():
    functions = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 45]
    assert long == []


BENCHMARKS = sorted((ROOT / "tests" / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_use_what_there_is(path):
    """They run on demand only: what they take from the script must not go without a word."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
    used = {node.attr for node in nodes if getattr(node.value, "id", "") == "t"}
    assert not {name for name in used if not hasattr(t, name)}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_override_what_there_is(path):
    """A method in the place of one of the script's has its parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        bases = [getattr(t, base.attr) for base in getattr(node, "bases", ())
                 if getattr(getattr(base, "value", None), "id", "") == "t"]  # fmt: skip
        for method in (x for x in node.body if isinstance(x, ast.FunctionDef)) if bases else ():
            for theirs in (getattr(base, method.name, None) for base in bases):
                names = [argument.arg for argument in method.args.args]
                assert not theirs or names == list(inspect.signature(theirs).parameters), (
                    method.name
                )
