"""Who may import whom: launch -> pipeline, launch -> model, and nothing else between the three."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

ALLOWED = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "launch": {"launch", "pipeline", "model"},
}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_may(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = {name.split(".")[0] for name in imported(path)} & ALLOWED.keys()
        assert ours <= ALLOWED[package], path


@pytest.mark.parametrize("module", ["network", "tower", "joined", "layers", "response_norm", "compiled", "cpu_kernels",
                                    "convolutions", "captured", "softmax", "optimizer", "training", "recipe",
                                    "schedule", "gpu_kernels/normalisation", "gpu_kernels/elementwise",
                                    "gpu_kernels/device"])
def test_the_mathematics_knows_no_transport(module):
    names = imported(ROOT / "model" / f"{module}.py")
    assert not any(name.startswith("torch.distributed") for name in names)
    assert not names & {f"model.exchange.{transport}" for transport in
                        ("rpc", "cuda_ipc", "signals", "collectives", "local", "mailbox", "meeting")}
