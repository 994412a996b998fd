#!/usr/bin/env bash
# §2's efficiency on CIFAR-10, scaled down to one CPU core: pixels against codes at an equal time of training. From the root:
#     bash results/efficiency/run.sh CIFAR WEIGHTS       CIFAR holds cifar-10-batches-bin; WEIGHTS: see frechet.py
# `--benchmark` measured 2.89 s for a step on pixels, 0.526 s on codes, 0.315 s for the first stage, and encoding 60,000 pictures takes about 4 minutes: 36
# minutes each. (The losses of 10,000 test pictures take ten minutes more for the pixels.)
set -euo pipefail
python train_vq.py --preset cifar10 --data-dir $1 --base-channels 32 --residual-blocks 1 --code-width 64 --batch-size 16 --lr 1e-3 \
    --warmup-steps 100 --restart-every 25 --steps 2280 --eval-every 1140 --out runs/efficiency/vq
python train_gpt.py --preset cifar10 --data-dir $1 --views 1 --n-layer 4 --n-embd 192 --n-head 3 --dropout 0 --batch-size 16 --lr 1.5e-3 \
    --warmup-steps 50 --vq runs/efficiency/vq/checkpoint.pt --steps 2280 --eval-every 1140 --out runs/efficiency/codes
python train_gpt.py --preset cifar10 --data-dir $1 --views 1 --n-layer 4 --n-embd 192 --n-head 3 --dropout 0 --batch-size 16 --lr 1.5e-3 \
    --warmup-steps 50 --pixels --steps 750 --eval-every 750 --checkpoint-every 250 --out runs/efficiency/pixels
for kind in codes pixels; do
    python sample.py --checkpoint runs/efficiency/$kind/checkpoint.pt --count 5000 --batch-size 125 --out runs/efficiency/$kind-samples/
    python sample.py --checkpoint runs/efficiency/$kind/checkpoint.pt --count 32 --out results/efficiency/$kind.png
    cp runs/efficiency/$kind/log.jsonl results/efficiency/$kind.jsonl
done
cp runs/efficiency/vq/log.jsonl results/efficiency/first_stage.jsonl
python results/efficiency/frechet.py $2 $1 runs/efficiency/codes-samples runs/efficiency/pixels-samples
