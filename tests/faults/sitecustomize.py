"""Inject a fault into every process of a run: Python executes this file at each start.

FAULT holds JSON: for each module of the program, code that is executed in it when it has been
imported; the code under "" is executed at once. Tests set it with `conftest.fault`.
"""

import builtins
import json
import os

FAULT = json.loads(os.environ.get("FAULT", "{}"))
original_import = builtins.__import__


def import_and_change(name, *args, **kwargs):
    module = original_import(name, *args, **kwargs)
    # Not `name`: that of a relative import is "utils" too, or even "".
    if module.__name__ in FAULT and not hasattr(module, "is_changed"):
        module.is_changed = True
        exec(FAULT[module.__name__], module.__dict__)  # noqa: S102
    return module


if FAULT:
    builtins.__import__ = import_and_change
    exec(FAULT.get("", ""), {})  # noqa: S102
