"""What launch/gpu_check.sh is given, looked at before anything is measured: prints commit and hardware, or one line of
what is wrong.

`python -m launch.gpu_check SHARDS DEVICE TRANSPORT PRECISION RECIPE`
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch import facts
from launch.choice import choose
from launch.commands.options import PRECISIONS, TRANSPORTS
from launch.errors import UserError
from model.errors import RecipeError
from model.recipe import recipe_named
from pipeline.errors import DataError
from pipeline.manifest import check_files, load_manifest


def main(shards: str, device: str, transport: str, precision: str, recipe: str) -> None:
    try:
        check_files(Path(shards), load_manifest(Path(shards))[0].files(), hashes=False)
        recipe_named(recipe)
        for name, value, known in (("TRANSPORT", transport, TRANSPORTS), ("PRECISION", precision, PRECISIONS)):
            if value not in known:
                raise UserError(f"{name} is {value}; there are {', '.join(known)}")
        choose(device, transport, precision, 2)
    except (UserError, RecipeError, DataError) as error:
        sys.exit(f"alexnet: {error}")
    print(facts.commit(), facts.hardware(None))


if __name__ == "__main__":
    main(*sys.argv[1:])
