#!/usr/bin/env bash
# Try and measure everything on a host with GPUs, in some ten minutes:  bash launch/gpu_check.sh SHARDS OUT
#
# Needs no network. Each part leaves its output in OUT, and OUT/PART.done where it went well; what has that is not run
# again, so start the same command again after a stop. OUT belongs to one commit, host, shards and settings: others need
# another folder. OUT/summary.txt has a line a part.
# PARTS="tests bench" runs these alone; RECIPE, PRECISION, TRANSPORT and STEPS say what is measured, LIMIT_S (400) ends a
# part, DEVICE=cpu tries the script where there is no GPU.
set -ufo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mistake() {
    echo "alexnet: $1" >&2
    exit 2
}
[ $# = 2 ] && [ -n "$2" ] && [ -f "$1/manifest.json" ] ||
    mistake "usage: bash launch/gpu_check.sh SHARDS OUT; SHARDS is a folder that alexnet preprocess wrote"
parts=${PARTS:-host tests train bench} limit=${LIMIT_S:-400} steps=${STEPS:-300}
for part in $parts; do
    [[ " host tests train bench " = *" $part "* ]] || mistake "PARTS has $part; there are host, tests, train and bench"
done
[[ $limit =~ ^[1-9][0-9]*$ && $steps =~ ^[1-9][0-9]*$ ]] || mistake "LIMIT_S and STEPS are whole numbers, from 1"
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
command -v "$python" > /dev/null || mistake "$python: no such program; name a Python in PYTHON"
device=${DEVICE:-cuda} recipe=${RECIPE:-notes} precision=${PRECISION:-bf16}
transport=${TRANSPORT:-$([ "$device" = cuda ] && echo cuda-ipc || echo rpc)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
shards=$(cd -- "$1" && pwd)
known=$(cd "$root" && "$python" -m launch.gpu_check "$shards" "$device" "$transport" "$precision" "$recipe") || exit 2
settings="$known $(sha256sum < "$shards/manifest.json") $device $recipe $precision $transport $steps"

mkdir -p -- "$2" 2> /dev/null && [ -w "$2" ] || mistake "$2: cannot be written; name another folder"
out=$(cd -- "$2" && pwd)
while read -r name; do
    case $name in
        run-one | run-two | bench) [ -d "$out/$name" ] && [ -f "$out/settings" ] ;;
        settings | lock | summary.txt | summary.new) [ -f "$out/$name" ] ;;
        host.* | tests.* | train.* | bench.*) [[ $name =~ \.(txt|done)$ ]] && [ -f "$out/$name" ] ;;
        *) false ;;
    esac || mistake "$out: holds other files ($name); name another folder"
done < <(ls -A "$out")
exec 9>> "$out/lock"
flock -n 9 || mistake "$out: another gpu_check.sh is at work there; wait for it, or name another folder"
if [ -f "$out/settings" ]; then
    [ "$(cat "$out/settings")" = "$settings" ] ||
        mistake "$out: begun with other settings, shards, hardware or another commit; name another folder"
fi
echo "$settings" > "$out/settings"
cd "$root"

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

export -f host tests train bench
export root shards out python device recipe precision transport steps
stop() {
    kill -TERM "$running"
    for _ in {1..400}; do  # until all of the part has ended
        kill -0 -- "-$running" 2> /dev/null || break
        sleep 0.1
    done
    echo "alexnet: stopped in $part" >&2
    exit 130
}
guard=()  # has a part end when this script is killed
command -v setpriv > /dev/null && guard=(setpriv --pdeathsig TERM)
failed=0
for part in $parts; do
    reason=
    # Of a commit that nobody knows, or that files differ from ("+"), nothing is known.
    if [ ! -e "$out/$part.done" ] || [[ $known =~ ^(None|[0-9a-f]*\+)\  ]]; then
        rm -f "$out/$part.done"
        echo "$part ..." >&2
        "${guard[@]}" timeout --kill-after=10 "$limit" bash -c "$part" > "$out/$part.txt" 2>&1 9>&- &
        running=$!
        trap 'stop' INT TERM HUP
        wait "$running"
        code=$?
        trap - INT TERM HUP
        if [ $code = 0 ]; then touch "$out/$part.done"; fi
        if [ $code = 124 ] || [ $code = 137 ]; then reason="ended after LIMIT_S, $limit seconds: "; fi
    fi
    if [ -e "$out/$part.done" ]; then result=passed; else result=FAILED failed=1; fi
    line="$part: $result, $reason$(tail -n 1 "$out/$part.txt")"
    grep -v "^$part: " "$out/summary.txt" 2> /dev/null > "$out/summary.new"
    echo "$line" | tee -a "$out/summary.new"
    mv "$out/summary.new" "$out/summary.txt"
done
exit $failed
