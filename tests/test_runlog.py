"""The log survives a kill in the middle of a line."""

from __future__ import annotations

import pytest

from launch.profiling import RECORDED, SKIPPED, profiled
from launch.runlog import RunLog, of_the_run, read_log


def test_records_after_a_line_cut_short_are_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("start", step=0)
        log.write("steps", step=1)
    path.write_bytes(path.read_bytes()[:-5])
    with RunLog(path) as log:
        log.write("resume", step=0)
    assert [(record["event"], record["step"]) for record in read_log(path)] == [("start", 0), ("resume", 0)]


def test_a_whole_log_is_continued_without_a_gap(tmp_path):
    path = tmp_path / "log.jsonl"
    for event in ("start", "resume"):
        with RunLog(path) as log:
            log.write(event)
    assert path.read_text().count("\n") == 2 and len(read_log(path)) == 2


def test_no_path_keeps_nothing():
    with RunLog(None) as log:
        log.write("start")


def test_an_epoch_that_is_validated_anew_is_kept_once():
    records = [{"event": "start", "step": 0}, {"event": "steps", "step": 10}, {"event": "epoch", "step": 10},
               {"event": "steps", "step": 15}, {"event": "resume", "step": 10, "validates": True},
               {"event": "epoch", "step": 10}, {"event": "resume", "step": 10, "validates": False}]
    assert of_the_run(records, "epoch") == [{"event": "epoch", "step": 10}]
    assert of_the_run(records, "steps") == [{"event": "steps", "step": 10}]


@pytest.mark.parametrize("steps", [3, SKIPPED + 1, SKIPPED + RECORDED])
def test_a_trace_or_a_word_that_there_is_none(tmp_path, capsys, steps):
    path = tmp_path / "trace.json"
    path.write_text("of an earlier run")
    with profiled(path) as end_step:
        for _ in range(steps):
            end_step()
    whole = steps == SKIPPED + RECORDED
    assert path.exists() == whole and (f"there were {steps}: no trace" in capsys.readouterr().err) != whole
