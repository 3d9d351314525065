"""Two towers in two processes equal one whole network: through torchrun and the real transports."""

from __future__ import annotations

import json

import pytest


def compare(torchrun, *arguments) -> list[dict]:
    output = torchrun(2, "compare_towers.py", *arguments).stdout
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert sorted(record["rank"] for record in found) == [0, 1]
    return found


@pytest.mark.parametrize("transport, dropout", [("rpc", "0"), ("rpc", "0.5"), ("gloo", "0.5")])
def test_towers_equal_the_whole_in_double_precision(torchrun, transport, dropout):
    for record in compare(torchrun, "tiny", dropout, "float64", 7, 4, transport, "cpu"):
        assert max(record["loss"] + record["gradient"] + record["weight"]) < 1e-10, record


@pytest.mark.parametrize("recipe", ["notes", "source"])
def test_full_width_in_double_precision(torchrun, recipe):
    for record in compare(torchrun, recipe, "0.5", "float64", 1000, 2, "rpc", "cpu"):
        assert record["parameters"] == [60_965_224, 30_482_612]
        assert max(record["loss"] + record["gradient"] + record["weight"]) < 1e-10, record


def test_full_width_in_single_precision(torchrun):
    """Sums of up to 9,216 products in other orders: a few times 1e-6 of each tensor's largest value.

    Gradients are not continuous where a unit is zero: a step in which one of 700,000 is within rounding of it is off by
    some percent in one layer. Hence the best of five steps, each from equal weights; an error would be in all.
    """
    for record in compare(torchrun, "notes", "0.5", "float32", 1000, 2, "rpc", "cpu"):
        assert max(record["loss"]) < 1e-6, record
        assert min(record["gradient"]) < 1e-5 and max(record["gradient"]) < 0.5, record
        assert min(record["weight"]) < 1e-5 and max(record["weight"]) < 0.05, record


def test_towers_in_mixed_precision(torchrun):
    """Messages are bfloat16 then, and so is the rounding where the halves of conv3 are added: 1/256 of a number."""
    for record in compare(torchrun, "tiny", "0.5", "bfloat16", 7, 16, "rpc", "cpu"):
        assert max(record["loss"]) < 5e-3 and max(record["gradient"]) < 0.8, record


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["rpc", "rpc-staged", "cuda-ipc"])
def test_towers_equal_the_whole_on_gpus(torchrun, transport):
    for record in compare(torchrun, "notes", "0.5", "float64", 1000, 4, transport, "cuda"):
        assert max(record["loss"] + record["gradient"] + record["weight"]) < 1e-10, record


@pytest.mark.gpu
@pytest.mark.parametrize("precision, transport", [("fp32", "cuda-ipc"), ("bf16", "cuda-ipc"), ("fp32", "rpc")])
def test_a_captured_tower_is_the_tower(torchrun, precision, transport):
    output = torchrun(2, "captured_tower.py", precision, transport).stdout
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(records) == 2 and records[0]["losses"] == records[1]["losses"]
    for record in records:
        assert record["losses"] == pytest.approx(record["expected"], rel=1e-4 if precision == "fp32" else 2e-2)
        assert record["cosine"] > (0.999 if precision == "fp32" else 0.9)
        assert len(set(record["losses"])) == len(record["losses"])
