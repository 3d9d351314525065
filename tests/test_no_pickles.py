"""Nothing loads from a file what could be code: pickles, YAML, NumPy's objects."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

# Modules whose readers run what a file says. `pickle` may be used for what its own processes say: see MAY_PICKLE.
UNSAFE = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "jsonpickle", "runpy"}
MAY_PICKLE = {  # what of `pickle` they use
    "pipeline/workers.py": frozenset({"dumps"}),  # arguments for workers that it has started
    "launch/unpickling.py": frozenset({"Unpickler", "UnpicklingError", "PickleError", "dumps"}),  # makes torch's safe
}
SAFE_IF = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
NEVER = {"torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.ops.load_library",
         "torch.classes.load_library", "torch.serialization.load", "pandas.read_pickle", "numpy.lib.format.read_array",
         "eval", "exec", "compile", "__import__"}


def faults(source: str, may: frozenset[str] = frozenset()) -> list[str]:
    """Return what a program uses that may run what a file says; `may` are the names of `pickle` that it may use."""
    tree, known, found = ast.parse(source), {}, []
    unsafe = UNSAFE - ({"pickle"} if may else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in unsafe]
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if node.module.split(".")[0] in UNSAFE else []

    def meant(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{meant(node.value)}.{node.attr}"
        return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    safely_called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and SAFE_IF.get(meant(node.func)) in [
                (one.arg, one.value.value) for one in node.keywords if isinstance(one.value, ast.Constant)]:
            safely_called.add(node.func)
    for node in ast.walk(tree):
        name = meant(node)
        if name in NEVER or name in SAFE_IF and node not in safely_called:
            found.append(name)
        elif name.startswith("pickle.") and name.split(".")[1] not in may:
            found.append(name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # a program that is written for others
            lines = node.value.splitlines()
            found += [line for line in lines if "torch.load(" in line and "weights_only=True" not in line]
    return found


@pytest.mark.parametrize("package", ["pipeline", "launch", "model"])
def test_sources_load_no_code(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        may = MAY_PICKLE.get(path.relative_to(ROOT).as_posix(), frozenset())
        assert faults(path.read_text(encoding="utf-8"), may) == [], path


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(file)", "import torch\ntorch.load(file, weights_only=False)",
    "import torch\ntorch.load(file, weights_only=trusted)", "from torch import load\nload(file)",
    "import torch as t\nt.load(file, map_location='cpu')", "import torch\nread = torch.load",
    "import torch\ntorch.jit.load(file)", "import numpy as np\nnp.load(file)", "import numpy\nnumpy.load(file, 'r')",
    "import numpy as np\nnp.load(file, allow_pickle=True)", "from numpy import load as read\nread(file)",
    "import pickle", "import pickle\npickle.load(file)", "from pickle import loads", "import joblib",
    "import yaml\nyaml.safe_load(file)", "eval(text)", "exec(text)", "program = 'state = torch.load(path)'",
])  # fmt: skip
def test_what_would_load_code_is_found(source):
    assert faults(source)


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(file, weights_only=True)", "import numpy as np\nnp.load(file, allow_pickle=False)",
    "import json\njson.loads(text)", "network.eval()", "self.load(file)",
])  # fmt: skip
def test_what_loads_data_is_not(source):
    assert not faults(source)


def test_pickle_may_be_used_as_is_said_alone():
    assert not faults("import pickle\npickle.dumps(1)", frozenset({"dumps"}))
    assert faults("import pickle\npickle.loads(data)", frozenset({"dumps"}))
    assert all((ROOT / name).is_file() for name in MAY_PICKLE)
