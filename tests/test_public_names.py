import ast
import inspect
import subprocess
import sys

import pytest

import revnet


def test_the_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse(inspect.getsource(revnet))
    seen = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == set(revnet._MODULES.items())
    assert all(name in dir(revnet) for name in revnet.__all__)


def test_an_unknown_name_raises():
    with pytest.raises(AttributeError, match="no attribute 'Reversibel'"):
        revnet.Reversibel  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, revnet; sys.exit('torch' in sys.modules)"], check=True
    )
