"""What `alexnet watch` says of a log: of one that grows, is cut, replaced or damaged, of silence, and of the end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from launch import watch
from launch.cli import cli
from launch.runlog import RunLog
from launch.watch import Watch, follow

START = {"step": 0, "steps_per_epoch": 100, "images": 3200, "recipe": {"epochs": 5, "batch": 32}}


class Clocks:
    """Both clocks that Watch reads; the wall's may jump."""

    def __init__(self):
        self.wall, self.steady = time.time(), 1000.0

    def monotonic(self) -> float:
        return self.steady

    def time(self) -> float:
        return self.wall


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(watch.time, "monotonic", clocks.monotonic)
    monkeypatch.setattr(watch.time, "time", clocks.time)
    return clocks


@pytest.fixture
def run(tmp_path) -> Path:
    write(tmp_path, "start", **START)
    return tmp_path


def write(run: Path, event: str, **fields) -> None:
    with RunLog(run / "log.jsonl") as log:
        log.write(event, **fields)


def steps(run: Path, step: int, **fields) -> None:
    write(run, "steps", **{"step": step, "loss": 2.5, "train_top1_error": 0.75, "images_per_s": 64.0, **fields})


def alexnet(*arguments):
    return CliRunner().invoke(cli, ["watch", *map(str, arguments)])


def test_how_far_it_is_and_how_long_it_goes_on(run):
    steps(run, 1, images_per_s=2.0)  # the first one is slow, and does not count for the time left
    for step in (11, 21, 31, 91, 100):
        steps(run, step, memory_gib=3.25)
    write(run, "epoch", epoch=1, step=100, val={"top1": 0.6, "top5": 0.2, "images": 50}, validation_s=8.0)
    steps(run, 111, loss=2.25)
    write(run, "checkpoint", step=100, path="checkpoints/step-000000100")  # is whole later
    done = alexnet(run, "--once", "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said.pop("age_s") < 60
    # 389 steps of 32 images at 64 images/s, and 3.89 validations of 8 s
    assert said.pop("left_s") == pytest.approx(389 * 32 / 64 + 3.89 * 8)
    assert said == {
        "run": str(run), "state": "running", "reason": None, "step": 111, "total_steps": 500, "epoch": 1.11,
        "epochs": 5, "loss": 2.25, "train_top1_error": 0.75, "images_per_s": 64.0, "memory_gib": None, "val_epoch": 1,
        "val_top1_error": 0.6, "val_top5_error": 0.2, "checkpoint_step": 100, "resumes": 0, "repeated_steps": 0,
    }
    line = alexnet(run, "--once").stdout
    assert line.startswith("running, step 111 of 500, epoch 1.11 of 5, 4 min left, loss 2.250, training error 75.00%, "
                           "64 images/s, validation top-1 60.00%, top-5 20.00%, checkpoint at step 100, heard of ")


def test_it_stops_where_it_was_told_to(tmp_path):
    write(tmp_path, "start", **START, stop=120)
    steps(tmp_path, 100)
    said = Watch(tmp_path).to_dict()
    assert said["total_steps"] == 120 and said["left_s"] == pytest.approx(20 * 32 / 64)


def test_only_what_is_new_is_read(run):
    for step in (1, 11, 21, 31):
        steps(run, step)
    seen, path = Watch(run), run / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"#" * 200 + whole[200:])  # its first line, which would be missed if it were read again
    assert not seen.look()
    steps(run, 41)
    assert seen.look() and not seen.look()
    assert (seen.progress.step, seen.progress.total) == (41, 500)


def test_a_line_is_read_once_it_is_whole(run):
    seen = Watch(run)
    line = b'{"event": "steps", "step": 11, "loss": 2.0, "images_per_s": 64}\n'
    with open(run / "log.jsonl", "ab", buffering=0) as log:
        log.write(line[:30])
        assert not seen.look() and seen.progress.step == 0
        log.write(line[30:])
    assert seen.look() and (seen.progress.step, seen.progress.figures["loss"]) == (11, 2.0)


@pytest.mark.parametrize("change", ["cut", "replaced", "emptied"])
def test_a_log_that_is_cut_or_replaced_is_read_anew(run, change):
    for step in (1, 11, 21, 31):
        steps(run, step)
    seen, path = Watch(run), run / "log.jsonl"
    if change == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
        expected = ("running", 11)
    elif change == "replaced":
        path.unlink()
        assert not seen.look() and seen.progress.step == 31  # away for the moment
        write(run, "start", **START)
        for step in range(1, 80):  # longer than the other
            steps(run, step)
        expected = ("running", 79)
    else:
        path.write_bytes(b"")
        expected = ("none", 0)
    assert seen.look() == (change != "emptied")
    assert (seen.state(), seen.progress.step) == expected and str(expected[1]) in seen.line()


def test_damaged_lines_are_passed_over(run):
    steps(run, 11)
    with open(run / "log.jsonl", "ab") as log:
        log.write(b"\0" * 5000 + b'\n{"event": "ste\n\xff\xfe\n[]\n7\n{}\n{"event": 3}\n' + b"[" * 100_000 + b"\n")
        log.write(b'{"event": "steps", "step": ' + b"9" * 5000 + b"}\n\n")
    steps(run, 21)
    assert json.loads(alexnet(run, "--once", "--json").stdout)["step"] == 21


@pytest.mark.parametrize("value", [None, "x", [], {}, True, float("nan"), float("inf"), 10**400, -1],
                         ids=lambda value: str(value)[:4])
def test_odd_values_end_nothing(run, value):
    for field in ("step", "images_per_s", "loss", "memory_gib"):
        steps(run, 11)
        write(run, "steps", **{"step": 21, "loss": 2.5, "images_per_s": 64.0, field: value})
        assert (Watch(run).progress.step, Watch(run).state()) == (11 if field == "step" else 21, "running")
        write(run, "epoch", step=21, epoch=value, val=value, validation_s=value)
        write(run, "epoch", step=21, epoch=value, val={"top1": value}, validation_s=value)
    write(run, "resume", step=value, recipe=value, steps_per_epoch=value, images=value, repeats=value, time=value)
    said = alexnet(run, "--once", "--json")
    json.loads(said.stdout, parse_constant=lambda name: pytest.fail(name))
    assert said.exit_code == 0 and alexnet(run, "--once").exit_code == 0


def test_silence_is_longer_than_usual(run, clocks):
    for step in (1, 11, 21):
        steps(run, step)  # 10 steps: 5 s
    write(run, "epoch", step=21, epoch=1, val={"top1": 0.6, "top5": 0.2}, validation_s=10.0)
    seen = Watch(run)
    usual = 60 + 5 * 10
    clocks.wall += 1e6  # a clock that was set: of no account
    clocks.steady += usual - 5
    assert not seen.look() and seen.state() == "running"
    clocks.steady += 10
    assert seen.state() == "silent" and seen.line().startswith("silent for 2 min, step 21")
    write(run, "evaluation", step=21, split="val")  # of another command
    assert not seen.look() and seen.state() == "silent"
    steps(run, 31)
    assert seen.look() and seen.state() == "running" and seen.age_s() == 0


def assert_silent_after(run, clocks, seconds):
    """And a little more, but not before."""
    seen = Watch(run)
    clocks.steady += seconds
    assert seen.state() == "running"
    clocks.steady += 100
    assert seen.state() == "silent"


@pytest.mark.parametrize("resumed", [False, True])
def test_before_the_first_line_of_steps_it_may_take_minutes(run, clocks, resumed):
    if resumed:
        for step in (1, 11):
            steps(run, step)
        write(run, "resume", **START)
    assert_silent_after(run, clocks, 300)


def test_the_first_validation_may_take_an_epoch(run, clocks):
    for step in (*range(1, 100, 10), 100):
        steps(run, step, images_per_s=8.0)  # 40 s; an epoch of 3,200 images 400 s
    assert_silent_after(run, clocks, 400)


def test_of_what_was_before_the_records_time_tells(run, clocks):
    steps(run, 1)
    clocks.wall += 7 * 3600
    assert Watch(run).line().startswith("silent for 7 h 0 min") and alexnet(run, "--once").exit_code == 1
    clocks.wall -= 9 * 3600  # another machine's clock, two hours behind
    assert Watch(run).age_s() == 0 and alexnet(run, "--once").exit_code == 0


@pytest.mark.parametrize("event, fields, exit_code, said", [
    ("end", {"trained_s": 9.5}, 0, "ended, step 40"), ("failed", {"reason": "the loss is NaN"}, 1,
                                                       "failed (the loss is NaN), step 40"),
    ("stopped", {}, 1, "stopped, step 40"),
])
def test_the_end(run, event, fields, exit_code, said):
    steps(run, 31)
    write(run, event, step=40, **fields)
    write(run, "evaluation", step=40, split="val")  # of another command
    for options in (["--once"], []):
        done = alexnet(run, *options)
        assert done.exit_code == exit_code and done.stdout.startswith(said) and done.stdout.count("\n") == 1
        assert done.stderr == ""


def test_resumed_runs_go_on(run):
    steps(run, 31)
    write(run, "checkpoint", step=21, path="checkpoints/step-000000021")
    write(run, "failed", step=31, reason="a full disk")
    write(run, "resume", **{**START, "step": 21}, repeats=14)
    seen = Watch(run)
    assert seen.state() == "running" and (seen.progress.step, seen.progress.reason) == (21, None)
    steps(run, 31)
    write(run, "resume", **{**START, "step": 21})  # of a version that did not count
    steps(run, 41)
    assert seen.look() and "resumed 2 times, 24 steps done again" in seen.line()
    assert (seen.progress.resumes, seen.progress.repeated, seen.progress.step) == (2, 24, 41)


def test_what_the_user_does_wrong(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "log.jsonl").write_bytes(b"")
    for told, *arguments in (("no run there", tmp_path / "none"), ("no run there", tmp_path),
                             ("nothing has been trained there yet", tmp_path / "begun"),
                             ("--json goes with --once", tmp_path, "--json")):
        done = alexnet(*arguments)
        if "--json" not in arguments:
            assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.exit_code == 2 and told in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO, Terminal])
def test_following(run, monkeypatch, out):
    """A line for all that is new; on a terminal one that is refreshed and fits."""
    script = [lambda: steps(run, 1), lambda: None, lambda: steps(run, 11), lambda: None,
              lambda: write(run, "end", step=11, trained_s=2.0)]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: script.pop(0)())
    monkeypatch.setenv("COLUMNS", "50")
    written = out()
    assert follow(Watch(run), written) == "ended" and script == []
    text = written.getvalue()
    if out is Terminal:
        *shown, last = text.split("\r")[1:]
        assert len(shown) == 5 and {len(line) for line in shown} == {49} and text.count("\n") == 1
        assert last.startswith("ended, step 11 of 500, ") and last.rstrip().endswith("64 images/s")
    else:
        shown = text.splitlines()
        assert [line.split(" of ")[0] for line in shown] == ["running, step 0", "running, step 1", "running, step 11",
                                                             "ended, step 11"]


def test_silence_is_told_once_and_its_end(run, clocks, monkeypatch):
    steps(run, 1)

    def wait(minutes):
        clocks.steady += 60 * minutes

    script = [lambda: wait(1), lambda: wait(60), lambda: wait(60), lambda: steps(run, 11),
              lambda: write(run, "end", step=11)]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: script.pop(0)())
    written = io.StringIO()
    follow(Watch(run), written)
    states = [line.split(",")[0] for line in written.getvalue().splitlines()]
    assert states == ["running", "silent for 1 h 1 min", "running", "ended"]


def test_a_run_that_is_stopped_may_be_started_anew(run, clocks, monkeypatch):
    def wait():
        clocks.steady += 61

    script = [lambda: write(run, "stopped", step=1), lambda: None, lambda: write(run, "resume", step=1),
              lambda: steps(run, 11), lambda: write(run, "stopped", step=11), wait]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: script.pop(0)())
    written = io.StringIO()
    assert follow(Watch(run), written) == "stopped" and script == []
    states = [line.split(",")[0] for line in written.getvalue().splitlines()]
    assert states == ["running", "stopped", "running", "running", "stopped"]


def test_a_line_without_an_end_is_no_record_and_control_characters_are_spelt_out(run):
    with open(run / "log.jsonl", "ab") as log:
        log.write(b'{"event": "steps", "step": 7, "loss": "' + bytes(100 << 20))
    began = time.perf_counter()
    seen = Watch(run)
    assert time.perf_counter() - began < 5 and len(seen._rest) <= 2 * watch.LONGEST and seen.progress.step == 0
    with open(run / "log.jsonl", "ab") as log:
        log.write(b'"}\n')
    write(run, "failed", step=9, reason="\x1b]0;owned\x07 a\nb")
    seen.look()
    assert seen.line().startswith("failed (\\x1b]0;owned\\x07 a b), step 9")


def test_ctrl_c_ends_the_watching_quietly(run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    done = alexnet(run)
    assert done.exit_code == 130 and done.stderr == "" and done.stdout.count("\n") == 1


def test_a_log_of_days_is_read_in_no_time_and_without_torch(run):
    line = b'{"event": "steps", "time": "2012-09-30T00:00:00Z", "step": %d, "loss": 2.5, "images_per_s": 64.0}\n'
    with open(run / "log.jsonl", "ab") as log:
        log.writelines(line % step for step in range(1, 100_000, 10))
    code = ("import sys\nfrom pathlib import Path\nfrom launch.watch import Watch\n"
            "print(Watch(Path(sys.argv[1])).progress.step, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "99991 False\n", done.stderr
