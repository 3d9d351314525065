#!/usr/bin/env bash
# Train the two towers on this host:  bash launch/train.sh SHARDS RUN [options of `alexnet train`]
#
# Each of two processes holds one tower, on a GPU of its own where there are two; ports are chosen by torchrun. Variables:
# PROCESSES=4 (6, 8, ...) trains replicas of the pair, 1 the whole network in one process. RESTARTS=10 is how often
# processes that die are started anew. TORCHRUN holds torchrun's options in place of --standalone, for several hosts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for variable in PROCESSES RESTARTS; do
    if ! [[ ${!variable:-1} =~ ^[0-9]{1,4}$ ]]; then
        echo "alexnet: $variable=${!variable} is not a number" >&2
        exit 2
    fi
done
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# shellcheck disable=SC2086
exec "$python" -m launch.torchrun ${TORCHRUN:---standalone} --nproc-per-node="${PROCESSES:-2}" \
    --max-restarts="${RESTARTS:-10}" -m launch.cli train "$@"
