"""The first SIGTERM asks, a second one ends; and who cannot end in good order any more ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from launch.stopping import StopRequest
from model.errors import PeerError


def test_the_first_signal_only_asks():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.made
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("then, code", [
    ("os.environ['LOCAL_RANK'] = '1'; raise ValueError", -signal.SIGTERM),  # of which the first process tells
    ("raise PeerError('the other tower died')", -signal.SIGTERM),  # it has nothing to tell: others did
    ("sys.exit(3)", 3),
])  # fmt: skip
def test_what_ends_at_once(then, code):
    program = ("import os, signal, sys\nfrom launch.stopping import StopRequest\nfrom model.errors import PeerError\n"
               f"with StopRequest():\n    os.kill(os.getpid(), signal.SIGTERM)\n    {then}\n")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == code


def test_a_second_signal_is_the_same_request_unless_it_comes_late():
    program = ("import os, signal, time\nfrom launch import stopping\nstopping.IMPATIENT_S = 1\n"
               "with stopping.StopRequest() as request:\n"
               "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
               "    print(request.made, flush=True)\n"
               "    time.sleep(1.5); os.kill(os.getpid(), signal.SIGTERM); print('still there')\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n")


def test_an_error_that_was_not_asked_for_is_told():
    with pytest.raises(PeerError), StopRequest():
        raise PeerError("the other tower died")
