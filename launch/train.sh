#!/usr/bin/env bash
# Train the two towers:  bash launch/train.sh SHARDS RUN [options of `alexnet train`]
#
# Each of two processes holds one tower, on a GPU of its own where there are two; torchrun chooses ports. Variables:
# PROCESSES=4 (6, 8, ...) trains replicas of the pair, 1 the whole network in one process. RESTARTS=10 is how often
# processes that die are started anew. TORCHRUN holds torchrun's options in place of --standalone, for several hosts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! [[ ${PROCESSES:-2} =~ ^[1-9][0-9]{0,3}$ && ${RESTARTS:-10} =~ ^[0-9]{1,4}$ ]]; then
    echo "alexnet: PROCESSES=${PROCESSES:-2} RESTARTS=${RESTARTS:-10}: PROCESSES is from 1 to 9999, RESTARTS from 0" >&2
    exit 2
fi
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# shellcheck disable=SC2086
exec "$python" -m launch.torchrun ${TORCHRUN:---standalone} --nproc-per-node="${PROCESSES:-2}" \
    --max-restarts="${RESTARTS:-10}" -m launch.cli train "$@"
