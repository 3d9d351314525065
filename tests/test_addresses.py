"""Which interface the processes of several hosts meet on, and when strangers could reach it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from launch.addresses import address_of, interface_towards, warning_about

PROGRAM = """
import json, sys
from launch.addresses import address_of, interface_towards
print(json.dumps([[interface_towards(host) for host in sys.argv[1:]], address_of("private0"), address_of("other0")]))
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost", "::1", "fd00::1", "a..b", ""])
def test_loopback_and_what_is_no_host_have_no_interface(host):
    assert interface_towards(host) is None


def test_addresses_of_interfaces():
    assert address_of("lo") == "127.0.0.1"
    assert address_of("none-such") is None


@pytest.mark.parametrize("address, told", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.2", False),
    ("100.64.0.1", False), ("169.254.1.1", False), ("127.0.0.1", False), ("fd00::1", False), ("lo", False),
])  # fmt: skip
def test_addresses_of_the_internet_are_told(address, told):
    warning = warning_about(address)
    assert (warning is not None) == told
    assert not told or address in warning and "TP_SOCKET_IFNAME and GLOO_SOCKET_IFNAME" in warning


@pytest.fixture
def namespace():
    """A network of its own: private0 at 10.9.8.1/24, public0 at 8.8.4.1/24 and 10.9.7.1/24, and no other way out."""
    name = f"alexnet-{os.getpid()}"
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs iproute2 and root")
    try:
        for one in ("link set lo up", "link add private0 type veth peer name other0", "link set private0 up",
                    "link set other0 up", "link add public0 type veth peer name other1", "link set public0 up",
                    "link set other1 up", "addr add 10.9.8.1/24 dev private0", "addr add 8.8.4.1/24 dev public0",
                    "addr add 10.9.7.1/24 dev public0"):
            if subprocess.run(["ip", "-n", name, *one.split()], capture_output=True).returncode:
                pytest.skip(f"this kernel cannot: ip {one}")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_the_interface_is_the_one_on_the_way(namespace):
    hosts = ["10.9.8.7", "10.9.8.1", "8.8.4.4", "10.9.7.2", "172.16.0.1", "127.0.0.1"]
    done = subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", PROGRAM, *hosts], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    towards, private, none = json.loads(done.stdout)
    # 10.9.7.1 is a second address, which SIOCGIFADDR does not tell; to 172.16.0.1 there is no way.
    assert towards == ["private0", "private0", "public0", None, None, None]
    assert private == "10.9.8.1" and none is None
