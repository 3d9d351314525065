"""`alexnet`, of whose processes one dies in the first attempt before there is a step or a line in the log."""

import os
import signal

from launch.cli import main
from launch.environment import rank_and_size, restarts
from launch.trainer import Trainer

build = Trainer._build


def dying(trainer, newest):
    if restarts() == 0 and rank_and_size()[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    build(trainer, newest)


Trainer._build = dying
main()
