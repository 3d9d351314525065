#!/usr/bin/env bash
# The whole way on drawn pictures, about three minutes on two cores:  bash launch/demo.sh [FOLDER]
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../demo}")
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ -e "$folder" ]; then
    echo "alexnet: $folder is there already; remove it, or name another: bash launch/demo.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$folder"

echo "1. Draw a small data set in the three archives of ILSVRC-2012" >&2
.venv/bin/alexnet sample "$folder/archives"
echo "2. Pack it into shards" >&2
.venv/bin/alexnet preprocess "$folder/archives" "$folder/shards"
echo "3. Train two towers in two processes" >&2
bash launch/train.sh "$folder/shards" "$folder/run" --recipe tiny --epochs 6
echo "4. Evaluate with ten views" >&2
.venv/bin/alexnet evaluate "$folder/run" "$folder/shards" --views 10 --json > "$folder/errors.json"
.venv/bin/python - "$folder" <<'PYTHON'
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
errors = json.loads((folder / "errors.json").read_text())
classes = len(json.loads((folder / "run" / "run.json").read_text())["wnids"])
right, chance = 1 - errors["top1_error"], 1 / classes
print(f"\nTop-1 accuracy {right:.1%} over {errors['images']} validation images with ten views: "
      f"{right / chance:.1f} times chance ({chance:.0%}).")
print(f"Checkpoints: {folder / 'run' / 'checkpoints'}\nLog:         {folder / 'run' / 'log.jsonl'}")
sys.exit(0 if right > 3 * chance else f"alexnet: that is not well above chance: see the log")
PYTHON
