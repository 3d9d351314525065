#!/usr/bin/env bash
# Train the two towers on this host:  bash launch/train.sh SHARDS RUN [options of `alexnet train`]
#
# Each of the two processes holds one tower, on a GPU of its own where there are two. PROCESSES=1
# trains the whole network in one. Ports are chosen by torchrun.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${PROCESSES:-2} in
    1 | 2) ;;
    *) echo "alexnet: PROCESSES=$PROCESSES: the network has two towers, so 1 or 2" >&2; exit 2 ;;
esac
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m launch.torchrun --standalone --nproc-per-node="${PROCESSES:-2}" -m launch.cli train "$@"
