"""One statement, one thing: what a few lines can check of how the scripts are written."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = "train_ddp.py", "model.py", "data.py", "utils.py"
LONGEST_FUNCTION = 45  # lines
DEEPEST_NESTING = 4  # blocks in a function
# Tuples on the right of an assignment whose items belong together; none so far.
PAIRS: set[str] = set()


def complaints(source: str) -> list[str]:
    """Return what is packed in a script, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assign) and is_packed(node):
            found.append(f"{line}: packed assignment: {ast.unparse(node)}")
        if isinstance(node, ast.NamedExpr) and not has_reason(source, node):
            found.append(f"{line}: assignment expression: {ast.unparse(node)}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{line}: {node.name} has {length} lines")
        # The formatter indents each level, and the function's own, by four columns. That an
        # `elif` is no deeper than its `if` is only true of columns, not of the syntax tree.
        if isinstance(node, ast.stmt) and node.col_offset > 4 * (1 + DEEPEST_NESTING):
            found.append(f"{line}: nested too deeply: {ast.unparse(node)}")
    return found


def is_packed(assignment: ast.Assign) -> bool:
    """Whether two or more items of a tuple are computed here. A swap only names them."""
    value = assignment.value
    if not isinstance(value, ast.Tuple):
        return False
    if not any(isinstance(target, ast.Tuple) for target in assignment.targets):
        return False
    computed = [e for e in value.elts if not isinstance(e, ast.Name | ast.Subscript)]
    return len(computed) > 1 and ast.unparse(assignment) not in PAIRS


def has_reason(source: str, walrus: ast.NamedExpr) -> bool:
    """Whether it is in the condition of a `while` or `if` that uses the value in its body."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.While | ast.If):
            in_condition = {ast.dump(part) for part in ast.walk(node.test)}
            names = [n for part in node.body for n in ast.walk(part)]
            used = {n.id for n in names if isinstance(n, ast.Name)}
            if ast.dump(walrus) in in_condition and walrus.target.id in used:
                return True
    return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_statement_is_packed(script):
    assert complaints((ROOT / script).read_text()) == []


LINES = "\n    x = 1" * LONGEST_FUNCTION
ALLOWED = """
a, b = b, a
a[0], b = b, a[0]
a, b = f()
a = f(), g()
a, b = pair
while (line := read()):
    print(line)

def f():
    with a:
        for b in c:
            for d in b:
                if d:
                    pass
                elif e:
                    pass
"""
NESTED = (
    ALLOWED
    + """
                    if e:
                        return
"""
)


@pytest.mark.parametrize(
    "packed, complaint",
    [
        ("a, b = f(), g()", "packed assignment"),
        ("a, b = x.y, 3", "packed assignment"),
        ("c = a, b = [], 0", "packed assignment"),
        ("print(a := f())", "assignment expression"),
        ("if (a := f()):\n    pass", "assignment expression"),
        ("[b for b in c if (d := b)]", "assignment expression"),
        (f"def f():{LINES}", "f has 46 lines"),
        (f"class C:\n  async def f():{LINES}", "f has 46 lines"),
        (NESTED, "nested too deeply: return"),
    ],
)
def test_each_kind_of_packed_statement_is_found(packed, complaint):
    [found] = complaints(packed)
    assert complaint in found
    assert complaints(ALLOWED) == []
