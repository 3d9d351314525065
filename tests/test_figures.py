"""Figures and the report of a run: their numbers, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from launch.cli import cli
from launch.figures.kernels import colour_selectivity, draw_kernels
from launch.runlog import of_the_run
from launch.weights.bundle import bundle_of_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def alexnet(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """shards/, and run/ of one epoch, evaluated with ten views, with its figures."""
    folder = tmp_path_factory.mktemp("figures")
    for arguments in (["sample", folder / "archives", "--train-per-class", "8", "--val-per-class", "2"],
                      ["preprocess", folder / "archives", folder / "shards"],
                      ["train", folder / "shards", folder / "run", "--recipe", "tiny", "--epochs", "1", "--threads", 1],
                      ["evaluate", folder / "run", folder / "shards"],
                      ["figures", folder / "run", folder / "shards", "--pictures", "6", "--threads", "1"]):
        done = alexnet(*arguments)
        assert done.exit_code == 0, done.output
    return folder


def test_colour_selectivity():
    random = np.random.default_rng(0)
    grey = random.standard_normal((4, 1, 11, 11)).repeat(3, 1)
    colour = random.standard_normal((4, 3, 11, 11))
    colour -= colour.mean(1, keepdims=True)
    np.testing.assert_allclose(colour_selectivity(grey), 0, atol=1e-12)
    np.testing.assert_allclose(colour_selectivity(colour), 1, atol=1e-12)
    half = grey[:1] / np.linalg.norm(grey[0]) + colour[:1] / np.linalg.norm(colour[0])
    np.testing.assert_allclose(colour_selectivity(half), 0.5, atol=1e-12)
    assert colour_selectivity(random.standard_normal((500, 3, 11, 11))).mean() == pytest.approx(2 / 3, abs=0.01)
    assert colour_selectivity(np.zeros((1, 3, 11, 11))) == [0]
    _, means = draw_kernels(np.concatenate([grey, colour]), towers=2)
    assert means == pytest.approx([0, 1])


def test_steps_that_were_done_again_count_once():
    def step(number, loss):
        return {"event": "steps", "step": number, "loss": loss}

    resumed = {"event": "resume", "step": 11}
    records = [step(1, 3.0), step(11, 2.0), step(21, 1.0), resumed, step(21, 1.5), step(31, 1.2)]
    assert [record["loss"] for record in of_the_run(records, "steps")] == [3.0, 2.0, 1.5, 1.2]


def test_all_figures_are_there_and_their_numbers_are_the_networks(made):
    folder = made / "run" / "figures"
    for name in ("kernels", "guesses", "neighbours", "curves"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(set(picture.convert("L").resize((99, 99)).getdata())) > 5
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    numbers = json.loads((folder / "figures.json").read_text())
    kernels = bundle_of_run(made / "run").tensors["conv1.weight"].numpy()
    assert numbers["colour_selectivity"] == pytest.approx(
        [colour_selectivity(half).mean() for half in np.split(kernels, 2)], rel=1e-5)
    assert len(numbers["pictures"]) == 6 and len(numbers["neighbours"]) == 5
    assert all(len(one["guesses"]) == 5 for one in numbers["pictures"])


def test_names_of_classes_that_are_formulas_or_no_text(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    described = json.loads((run / "run.json").read_text())
    described["words"] = ["$\\frac{$", "a\ud800b", "<script>", "a\nb\x00", *described["words"][4:]]
    (run / "run.json").write_text(json.dumps(described))
    done = alexnet("figures", run, made / "shards", "--threads", "1")
    assert done.exit_code == 0 and not done.stderr, done.output


def test_two_towers_draw_the_same(made, torchrun, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(run / "figures")
    torchrun(2, "-m", "launch.cli", "figures", run, made / "shards", "--pictures", "6", "--threads", "1")
    one, two = (json.loads((folder / "figures" / "figures.json").read_text()) for folder in (made / "run", run))
    assert one["colour_selectivity"] == pytest.approx(two["colour_selectivity"])
    for mine, other in zip(one["pictures"], two["pictures"], strict=True):
        assert mine["name"] == other["name"]
        assert [g["probability"] for g in mine["guesses"]] == pytest.approx(
            [g["probability"] for g in other["guesses"]], abs=1e-5)
    assert (run / "figures" / "kernels.png").read_bytes() == (made / "run" / "figures" / "kernels.png").read_bytes()


def test_the_report_holds_what_the_run_says(made, tmp_path):
    done = alexnet("report", made / "run", "--out", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    records = [json.loads(line) for line in (made / "run" / "log.jsonl").read_text().splitlines()]
    evaluation = next(record for record in records if record["event"] == "evaluation")
    start = next(record for record in records if record["event"] == "start")
    assert evaluation["views"] == 10 and evaluation["images"] == 20
    manifest = json.loads((made / "shards" / "manifest.json").read_text())
    shards = [file["sha256"] for split in manifest["splits"].values() for file in split["files"]]
    for text in (f"{100 * evaluation['top1_error']:.2f} %", "37.5 %", "40.7 %", "do not compare", *shards,
                 start["code"], start["versions"]["torch"]):
        assert text in page, text
    marked = re.findall(r'<tr class="differs"><td><code>(\w+)</code>', page)
    assert marked == ["kernels", "neurons", "weight_std", "ones", "pixel_scale", "batch", "epochs", "learning_rate",
                      "schedule"]
    assert page.count('src="data:image/') == 4 and not re.search(r'(src|href)="(?!data:)', page)


def test_a_report_tells_of_each_environment_once(made, tmp_path):
    """A run of days may have been started a hundred times."""
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    start = next(record for record in records if record["event"] == "start")
    for step, changed in ((3, {}), (3, {}), (5, {"commit": "c0ffee"}), (6, {"commit": "c0ffee"})):
        records.append({**start, **changed, "event": "resume", "step": step, "repeats": 2})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert alexnet("report", run).exit_code == 0
    page = re.sub("<[^>]+>", " ", (run / "report.html").read_text())
    assert "Resumed 4 times; 8 steps were done twice." in " ".join(page.split())
    assert page.count(start["versions"]["torch"]) == 1 and page.count("c0ffee") == 1


def test_a_report_of_a_run_that_has_only_begun(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    for name in ("figures", "checkpoints", "similar"):
        shutil.rmtree(run / name)
    first = (run / "log.jsonl").read_text().splitlines()[0]
    (run / "log.jsonl").write_text(first + "\n")
    done = alexnet("report", run)
    assert done.exit_code == 0 and "No figures yet" in (run / "report.html").read_text()
    for line in ("3", "[]", '{"event": "steps"}', '{"event": "epoch", "step": 1}', '{"event": "evaluation"}'):
        (run / "log.jsonl").write_text(f"{first}\n{line}\n")
        done = alexnet("report", run)
        assert done.exit_code == (0 if line in ("3", "[]") else 2) and len(done.stderr.splitlines()) == 1, line
    for line in ('{"event": "steps", "step": 1}', '{"event": "steps"}\n{"event": "resume"}', '{"event": "failed"}'):
        (run / "log.jsonl").write_text(f"{first}\n{line}\n")
        done = alexnet("report", run)
        assert done.exit_code == 2 and "is not what training writes" in done.stderr
    page = (run / "report.html").read_bytes()
    assert alexnet("report", run, "--out", run / "log.jsonl").exit_code == 2
    assert (run / "log.jsonl").read_text().startswith(first) and (run / "report.html").read_bytes() == page
    (run / "manifest.json").write_text("{")
    done = alexnet("report", run)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    (run / "log.jsonl").unlink()
    assert "a report is made of it" in alexnet("report", run).stderr


PROBE = """<script>
window.onerror = message => document.body.dataset.error = message;
window.onload = () => {
  document.body.dataset.broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  document.body.dataset.images = document.images.length;
  const loaded = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  document.body.dataset.loaded = loaded.length;
  document.body.dataset.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_in_a_browser(made, tmp_path, width):
    assert alexnet("report", made / "run", "--out", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "probed.html").write_text(page.replace("<head>", f"<head>{PROBE}"))
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=10000", f"--window-size={width},900", "--dump-dom", str(tmp_path / "probed.html")],
        capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"<body[^>]*>", shown)[0]
    assert 'data-images="4"' in body and 'data-broken="0"' in body and 'data-loaded="0"' in body, body
    assert "data-error" not in body and 'data-wide="false"' in body, body
