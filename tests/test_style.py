"""One statement, one thing: what a few lines can check of how the scripts are written."""

import ast

import pytest
from conftest import ROOT

LONGEST_FUNCTION = 60  # lines
DEEPEST_NESTING = 4  # blocks in a function


def complaint(node: ast.AST) -> str:
    """Return what is packed in a part of a script, or an empty string."""
    if isinstance(node, ast.Assign) and is_packed(node):
        return "packed assignment"
    if isinstance(node, ast.NamedExpr):
        return "assignment expression"
    lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
    if isinstance(node, ast.FunctionDef) and lines > LONGEST_FUNCTION:
        return "long function"
    # The formatter indents each level, and the function's own, by four columns. That an `elif`
    # is no deeper than its `if` is only true of columns, not of the syntax tree.
    if isinstance(node, ast.stmt) and node.col_offset > 4 * (1 + DEEPEST_NESTING):
        return "deep nesting"
    return ""


def is_packed(assignment: ast.Assign) -> bool:
    """Whether two or more items of a tuple are computed here. A swap only names them."""
    if not isinstance(assignment.value, ast.Tuple):
        return False
    if not any(isinstance(target, ast.Tuple) for target in assignment.targets):
        return False
    items = assignment.value.elts
    computed = [e for e in items if not isinstance(e, ast.Name | ast.Subscript)]
    return len(computed) > 1


def complaints(source: str) -> list[tuple[int, str]]:
    """Return what is packed in a script, each with the number of its line."""
    nodes = [node for node in ast.walk(ast.parse(source)) if complaint(node)]
    return sorted((node.lineno, complaint(node)) for node in nodes)


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name
)
def test_no_statement_is_packed(script):
    assert complaints(script.read_text()) == []


SAMPLE = """
a[0], b = b, a[0]
a = f(), g()
a, b = f(), g()
c = a, b = [], x.y
print([b for b in c if (d := b)])

class C:
    def f():
        for a in b:
            for b in c:
                if d:
                    pass
                elif e:
                    if f:
                        pass

    def g():
"""


def test_each_kind_of_packing_is_found():
    length = "        a = 1\n" * (LONGEST_FUNCTION - 1)
    packed = [(4, "packed assignment"), (5, "packed assignment")]
    packed += [(6, "assignment expression"), (16, "deep nesting")]
    assert complaints(SAMPLE + length) == packed
    too_long = complaints(SAMPLE + length + "        a = 1\n")
    assert too_long == [*packed, (18, "long function")]
