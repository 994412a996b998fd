#!/usr/bin/env bash
# What is to be run on a GPU, in parts of at most nine minutes each. From the repository's root:
#     bash results/gpu/plan.sh PART          1: kernels, their tests and both tables     2: tiles and growth
#                                            3: benchmarks of training and sampling      4: CIFAR-10's first stage, §2
#                                            5: its GPT on codes                         6: the same GPT on pixels
# Logs, tables and pictures go to $OUT, or to results/gpu/. CIFAR=DIR: where CIFAR-10 is; without it scenes of its
# size are drawn. LIMIT: seconds of a part. PYTHON: the interpreter. TINY=1: the same commands in seconds, to try
# them on a CPU.
set -uo pipefail
PART=$1 OUT=${OUT:-results/gpu} PYTHON=${PYTHON:-python3} TINY=${TINY:-} LIMIT=${LIMIT:-510}
mkdir -p "$OUT"
DATA="--data scenes" RUNS=runs/gpu${TINY:+-tiny}
[ -n "${CIFAR:-}" ] && DATA="--data cifar10 --data-dir $CIFAR"
CODES="--preset cifar10 $DATA --vq $RUNS/vq/checkpoint.pt"
PAPER="--preset paper" LARGE="--batch-size 64" SMALL="" FIRST="--preset cifar10 $DATA" SECOND="" PIXELS="--pixels --batch-size 32"
if [ -n "$TINY" ]; then
    SMALL="--n-layer 2 --n-head 2 --n-embd 32" LARGE="--batch-size 2" PAPER="--preset demo"
    FIRST="$FIRST --base-channels 8 --residual-blocks 1 --code-width 8 --codebook-size 64 --steps 4 --eval-every 4"
    SECOND="--steps 2 --eval-every 2 --batch-size 2" PIXELS="--pixels"
fi

log() {  # NAME COMMAND …: until the part's time is over; then a training run is stopped as by Ctrl-C, and saves
    local left=$((LIMIT - SECONDS))
    echo "== $1, $left s left"
    { echo "\$ ${*:2}"; timeout --signal=INT --kill-after=20 $((left > 5 ? left : 5)) "${@:2}"; echo "status $?"; } 2>&1 |
        tee "$OUT/$1.txt"
}

train() {  # KIND SCRIPT FLAGS …: 40 seconds are kept for the samples; run again, it goes on
    LIMIT=$((LIMIT - 40)) log "$1" $PYTHON "${@:2}" --out "$RUNS/$1" --resume
    cp "$RUNS/$1/log.jsonl" "$OUT/$1.jsonl"
}

case $PART in
1)  [ -n "$TINY" ] && TESTS="-k strides" || TESTS=""
    log tests $PYTHON -m pytest -q tests/test_triton.py tests/test_kernels.py tests/test_gpt.py $TESTS
    log nearest_code $PYTHON -m kernels.nearest_code
    log causal_attention $PYTHON -m kernels.causal_attention ;;
2)  if [ -z "$TINY" ]; then
        log tiles $PYTHON results/kernels/tiles.py
        log growth $PYTHON results/kernels/growth.py
        cp results/kernels/growth-cuda.png "$OUT"
    fi ;;
3)  for compile in "" --compile; do
        log "gpt_12x256$compile" $PYTHON train_gpt.py $PAPER --benchmark $SMALL $compile
        log "gpt_64x512$compile" $PYTHON train_gpt.py $PAPER --data scenes --condition depth --benchmark $LARGE $SMALL $compile
    done
    log first_stage $PYTHON train_vq.py $PAPER --benchmark
    log gpt_step $PYTHON results/kernels/gpt_step.py
    [ -z "$TINY" ] && log sampling $PYTHON sample.py --preset paper --benchmark
    [ -z "$TINY" ] && log decoding $PYTHON results/gpu/decoding.py
    log pixels_or_codes $PYTHON results/efficiency/times.py $([ -n "$TINY" ] && echo --n-layer 1 --n-embd 64 --rounds 1) \
        $([ -z "$TINY" ] && echo --n-layer 24 --n-embd 1024 --batch-size 16 --device cuda) ;;
4)  train vq train_vq.py $FIRST
    cp $(ls $RUNS/vq/step-*.png | tail -2) "$OUT" ;;
5)  train codes train_gpt.py $CODES $SMALL $SECOND ;;
6)  train pixels train_gpt.py --preset cifar10 $DATA $PIXELS $SMALL $SECOND ;;
*)  echo "PART is $PART; choose 1 to 6" >&2
    exit 2 ;;
esac
if [ "$PART" -ge 5 ]; then
    KIND=$([ "$PART" = 5 ] && echo codes || echo pixels)
    log "sample_$KIND" $PYTHON sample.py --checkpoint $RUNS/$KIND/checkpoint.pt --count 64 --out "$OUT/$KIND.png"
fi
