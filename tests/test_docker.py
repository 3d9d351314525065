"""What docker/ asks for is there and held fast; tests/test_container.py builds and runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from dockerfile_parse import DockerfileParser
from test_structure import ALLOWED

from launch.cli import cli


def steps(instruction: str) -> list[str]:
    """Return what follows such an instruction in docker/Dockerfile, each on one line."""
    structure = DockerfileParser(str(ROOT / "docker/Dockerfile")).structure
    return [step["value"] for step in structure if step["instruction"] == instruction]


def copied() -> list[str]:
    return [source for step in steps("COPY") for source in step.split()[:-1]]


@pytest.fixture
def train() -> dict:
    """The service of docker/compose.yaml."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]
    assert list(services) == ["train"]
    return services["train"]


def test_everything_is_pinned():
    (base,) = steps("FROM")
    assert re.fullmatch(r"debian:[a-z]+-\d{8}-slim@sha256:[0-9a-f]{64}", base)
    requirements = [line.split(";")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert requirements and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line.strip()) for line in requirements)
    installed = re.findall(r"(?:apt-get|pip) install ([^&]*)", " && ".join(steps("RUN")))
    assert len(installed) == 3
    for word in " ".join(installed).split():
        assert word.startswith(("-", ".")) or "=" in word or word in ("requirements.txt", "ca-certificates")


def test_what_is_copied_is_there_and_sent_to_the_builder():
    assert all((ROOT / source).exists() for source in copied())
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line[0] == "!"} == set(copied())


def test_what_is_copied_is_all_that_it_takes(tmp_path):
    """Without anything else of the project the package can be built, and what is in the image starts."""
    for source in copied():
        (tmp_path / source).symlink_to(ROOT / source)
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    prepare = "import sys, setuptools.build_meta as build; build.prepare_metadata_for_build_wheel(sys.argv[1])"
    for command in ([sys.executable, "-c", prepare, metadata], ["bash", "launch/train.sh", "--help"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable})
        assert done.returncode == 0, done.stderr
    (packages,), (about,) = (list(metadata.glob(f"*.dist-info/{name}")) for name in ("top_level.txt", "METADATA"))
    assert set(packages.read_text().split()) == ALLOWED.keys()
    assert "Requires-Dist: torch==" in about.read_text()


def test_the_user_is_not_root():
    made = re.search(r"useradd [^&]*--uid (\d+) (\w+)", " ".join(steps("RUN")))
    assert made and int(made[1]) == 1000 and steps("USER") == [made[2]]


def test_the_health_check_is_a_command_of_ours():
    (check,) = steps("HEALTHCHECK")
    words = check.split("CMD ")[1].split()
    assert words[0] == "alexnet"
    options = {name for option in cli.commands[words[1]].params for name in option.opts}
    assert set(words[2:]) <= options


def test_lines_for_people_name_what_is_there(train):
    arguments = [step.split("=")[0] for step in steps("ARG")]
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/docker.md"))
    assert set(arguments) == set(re.findall(r"--build-arg (\w+)", pages))
    assert set(train["build"]["args"]) <= set(arguments)
    assert set(re.findall(r"docker[\w ]* -f (\S+)", pages)) == {"docker/Dockerfile", "docker/compose.yaml"}
    page = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in train["environment"])


def test_the_service_has_what_two_gpus_need(train):
    (devices,) = train["deploy"]["resources"]["reservations"]["devices"]
    assert {"gpu", "compute", "utility", "video"} == set(devices["capabilities"]) and devices["count"] == "all"
    environment = dict(word.split("=", 1) for step in steps("ENV") for word in step.split())
    assert set(environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == set(devices["capabilities"]) - {"gpu"}
    assert train["shm_size"] == "2gb" and train["stop_grace_period"] == "60s" and train["restart"] == "on-failure:3"
    assert {volume["target"]: volume.get("read_only", False) for volume in train["volumes"]} == {
        "/shards": True, "/runs": False}
    assert not any(volume["bind"]["create_host_path"] for volume in train["volumes"])  # it would be root's
    build = train["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == ROOT / "docker/Dockerfile"


@pytest.mark.parametrize(("environment", "options"), [
    ({}, "/shards {runs}/notes"),
    ({"RUN": "tiny", "OPTIONS": "--recipe tiny"}, "/shards {runs}/tiny --recipe tiny")])
def test_the_service_resumes_a_run_that_is_there(train, tmp_path, environment, options):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/train.sh").write_text('echo "$@"')
    runs = tmp_path / "runs"
    *shell, script = train["command"]
    script = script.replace("$$", "$").replace("/runs/", f"{runs}/")
    expected = options.format(runs=runs).split()

    def started() -> list[str]:
        return subprocess.run([*shell, script], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={"PATH": "/usr/bin:/bin", **environment}).stdout.split()

    assert started() == expected
    run = Path(expected[1])
    run.mkdir(parents=True)
    assert started() == expected
    (run / "run.json").touch()
    assert started() == [*expected[:2], "--resume", *expected[2:]]
