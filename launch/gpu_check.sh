#!/usr/bin/env bash
# Try and measure everything on a host with GPUs, in some ten minutes:  bash launch/gpu_check.sh SHARDS OUT
#
# Needs no network. Each part leaves its output in OUT, and OUT/PART.done where it went well; what has that, of the same
# commit, hardware, shards and settings, is not run again, so start the same command again after a stop. OUT/summary.txt
# has a line a part.
# PARTS="tests bench" runs these alone; RECIPE, PRECISION, TRANSPORT and STEPS say what is measured, LIMIT_S (400) ends a
# part, DEVICE=cpu tries the script where there is no GPU.
set -uo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mistake() {
    echo "alexnet: $1" >&2
    exit 2
}
[ $# = 2 ] && [ -f "$1/manifest.json" ] ||
    mistake "usage: bash launch/gpu_check.sh SHARDS OUT; SHARDS is a folder that alexnet preprocess wrote"
parts=${PARTS:-host tests train bench} limit=${LIMIT_S:-400} steps=${STEPS:-300}
for part in $parts; do
    [[ " host tests train bench " = *" $part "* ]] || mistake "PARTS has $part; there are host, tests, train and bench"
done
[[ $limit =~ ^[1-9][0-9]*$ && $steps =~ ^[1-9][0-9]*$ ]] || mistake "LIMIT_S and STEPS are whole numbers, from 1"
mkdir -p "$2" && [ -w "$2" ] || mistake "$2: cannot be written; name another folder"
shards=$(cd "$1" && pwd) out=$(cd "$2" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
device=${DEVICE:-cuda} recipe=${RECIPE:-notes} precision=${PRECISION:-bf16}
transport=${TRANSPORT:-$([ "$device" = cuda ] && echo cuda-ipc || echo rpc)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    mistake "no CUDA device that torch can use; run this on a host with a GPU (or DEVICE=cpu to try the script)"
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
    if [ -d "$out/run-two/checkpoints" ] && [ "$(cat "$out/train.begun" 2> /dev/null)" = "$settings" ]; then
        resume=(--resume)
    else
        rm -rf "$out/run-two"
        echo "$settings" > "$out/train.begun"
    fi
    bash launch/train.sh "$shards" "$out/run-two" "${options[@]}" "${resume[@]}" || return
    rm -rf "$out/run-one"
    PROCESSES=1 bash launch/train.sh "$shards" "$out/run-one" "${options[@]}" --profile
}
bench() {
    "$python" -m launch.cli bench all "$out/bench" --shards "$shards" --recipe "$recipe" --precision "$precision" \
        --device "$device" --transport "$transport"
}

known=$("$python" -c 'import torch; from launch import facts
print(facts.commit(), facts.hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")))')
settings="$known $(sha256sum < "$shards/manifest.json") $device $recipe $precision $transport $steps"
export -f host tests train bench
export root shards out python device recipe precision transport steps settings
guard=()  # has a part end when this script is killed
command -v setpriv > /dev/null && guard=(setpriv --pdeathsig TERM)
failed=0
for part in $parts; do
    # Of a commit that nobody knows, or that files differ from ("+"), nothing is known.
    if [ "$(cat "$out/$part.done" 2> /dev/null)" != "$settings" ] || [[ $known =~ ^(None|[0-9a-f]*\+)\  ]]; then
        rm -f "$out/$part.done"
        echo "$part ..." >&2
        "${guard[@]}" timeout --kill-after=10 "$limit" bash -c "$part" > "$out/$part.txt" 2>&1 &
        running=$!
        trap 'kill -TERM "$running"; wait "$running"; echo "alexnet: stopped in $part" >&2; exit 130' INT TERM HUP
        if wait "$running"; then echo "$settings" > "$out/$part.done"; fi
        trap - INT TERM HUP
    fi
    if [ -e "$out/$part.done" ]; then result=passed; else result=FAILED failed=1; fi
    line="$part: $result, $(tail -n 1 "$out/$part.txt")"
    grep -v "^$part: " "$out/summary.txt" 2> /dev/null > "$out/summary.new"
    echo "$line" | tee -a "$out/summary.new"
    mv "$out/summary.new" "$out/summary.txt"
done
exit $failed
