#!/usr/bin/env bash
# Quantized from the first step on, or after a tenth of the steps: four first stages each, and priors on three. From the root, after
# results/conditions/judge.py, an hour on one core:
#     bash results/first-stage/quantize_after.sh
set -euo pipefail
for share in 0 0.1; do
    for seed in 0 1 2 3; do
        run=runs/quantize-after/$share-$seed
        python train_vq.py --seed $seed --quantize-after $share --out $run
        python results/first-stage/dimensions.py $run/checkpoint.pt
        python results/locality/measure.py $run/checkpoint.pt
        [ $seed = 3 ] && continue
        python train_gpt.py --seed $seed --vq $run/checkpoint.pt --order zcurve --steps 2180 --eval-every 1090 --out $run/zcurve
        python results/conditions/measure.py $run/zcurve/checkpoint.pt
    done
done
