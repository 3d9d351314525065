#!/usr/bin/env bash
# Try and measure everything on a host with GPUs:  bash launch/gpu_check.sh SHARDS OUT
#
# Needs no network. Each part leaves its output in OUT, and OUT/PART.done where it went well; what has that is not run
# again, so start the same command again after a stop. OUT/summary.txt has a line a part.
# PARTS="tests bench" runs these alone; RECIPE, PRECISION, TRANSPORT and STEPS say what is measured, LIMIT_S (300) ends a
# part, DEVICE=cpu tries the script where there is no GPU.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# != 2 ] || [ ! -f "$1/manifest.json" ]; then
    echo "usage: bash launch/gpu_check.sh SHARDS OUT; SHARDS is a folder that alexnet preprocess wrote" >&2
    exit 2
fi
mkdir -p "$2" || exit 2
shards=$(cd "$1" && pwd) out=$(cd "$2" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
device=${DEVICE:-cuda} recipe=${RECIPE:-notes} precision=${PRECISION:-bf16} steps=${STEPS:-300}
transport=${TRANSPORT:-$([ "$device" = cuda ] && echo cuda-ipc || echo rpc)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "alexnet: no CUDA device that torch can use; run this on a host with a GPU (or DEVICE=cpu to try the script)" >&2
    exit 2
fi

host() {
    nvidia-smi || [ "$device" = cpu ] || return 1
    "$python" -c 'import json, torch; from launch import facts
print(json.dumps({"commit": facts.commit(), "versions": facts.versions(), "cuda": torch.version.cuda,
                  "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))'
}
tests() {  # those marked gpu: DALI's decoding on the GPU, and two processes on as many GPUs as there are
    "$python" -m pytest -m gpu -rs -p no:cacheprovider $(grep -l '^@pytest.mark.gpu' tests/test_*.py)
}
train() {  # two processes, then one
    local options=(--recipe "$recipe" --precision "$precision" --device "$device" --transport "$transport")
    options+=(--steps "$steps" --no-check)
    local resume=()
    [ -d "$out/run-two/checkpoints" ] && resume=(--resume) || rm -rf "$out/run-two"
    bash launch/train.sh "$shards" "$out/run-two" "${options[@]}" "${resume[@]}" || return
    rm -rf "$out/run-one"
    PROCESSES=1 bash launch/train.sh "$shards" "$out/run-one" "${options[@]}" --profile
}
bench() {
    "$python" -m launch.cli bench all "$out/bench" --shards "$shards" --recipe "$recipe" --precision "$precision" \
        --device "$device" --transport "$transport"
}

graphs() {  # a tower's step as CUDA graphs, which train and bench leave out
    "$python" -m pytest -m gpu -rs -p no:cacheprovider tests/test_towers.py -k captured || return
    "$python" -m launch.torchrun --standalone --nproc-per-node 2 -m launch.cli bench step --recipe "$recipe" \
        --precision "$precision" --device "$device" --transport "$transport" --graphs --no-peers
}

export -f host tests train bench graphs
export root shards out python device recipe precision transport steps
failed=0
for part in ${PARTS:-host tests train bench $([ "$device" = cuda ] && echo graphs)}; do
    if [ ! -e "$out/$part.done" ]; then
        echo "$part ..." >&2
        if timeout "${LIMIT_S:-300}" bash -c "$part" > "$out/$part.txt" 2>&1; then touch "$out/$part.done"; fi
    fi
    if [ -e "$out/$part.done" ]; then result=passed; else result=FAILED failed=1; fi
    line="$part: $result, $(tail -n 1 "$out/$part.txt")"
    grep -v "^$part: " "$out/summary.txt" 2>/dev/null > "$out/summary.new"
    echo "$line" | tee -a "$out/summary.new"
    mv "$out/summary.new" "$out/summary.txt"
done
exit $failed
