"""`alexnet` with one difference: tower 1 draws its crops and flips with another seed.

Nothing that the towers compare before the start shows it.
"""

import os

from launch.cli import main
from pipeline.batches import TrainingBatches

if os.environ["RANK"] == "1":
    start = TrainingBatches.__init__
    TrainingBatches.__init__ = lambda self, images, batch, seed, *rest: start(self, images, batch, seed + 1, *rest)

main()
