#!/usr/bin/env bash
# First stages whose encoder normalizes each position by itself, and priors on them. From the repository's root, after results/conditions/judge.py; some two
# hours on one core:
#     bash results/locality/run.sh
set -euo pipefail
with="python results/locality/position_norm.py"
$with train_vq.py --quantize-after 0 --out runs/locality/vq
$with train_gpt.py --vq runs/locality/vq/checkpoint.pt --codes-dir runs/locality/codes --out runs/locality/row
$with train_gpt.py --order zcurve --steps 3000 --vq runs/locality/vq/checkpoint.pt --codes-dir runs/locality/codes --out runs/locality/zcurve
$with results/locality/measure.py runs/locality/vq/checkpoint.pt
$with results/conditions/measure.py runs/locality/row/checkpoint.pt
$with results/conditions/measure.py runs/locality/zcurve/checkpoint.pt
for seed in 0 1 2; do
    run=runs/locality-$seed
    $with train_vq.py --preset demo --quantize-after 0 --steps 3300 --eval-every 1650 --seed $seed --out $run/vq
    $with results/locality/measure.py $run/vq/checkpoint.pt
    for order in row spiral; do
        $with train_gpt.py --preset demo --steps 5700 --eval-every 570 --vq $run/vq/checkpoint.pt --order $order --seed $seed --codes-dir $run/codes --out $run/$order
        $with results/conditions/measure.py $run/$order/checkpoint.pt
    done
done
cp runs/locality-0/vq/log.jsonl results/locality/first_stage.jsonl
cp runs/locality-0/spiral/log.jsonl results/locality/spiral.jsonl
cp runs/locality-0/spiral/step-005700.png results/locality/samples_spiral.png
