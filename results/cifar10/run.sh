#!/usr/bin/env bash
# CIFAR-10 by class, 8×8 codes, on one CPU core: about eleven minutes for the first stage, 25 for the GPT. From the repository's root:
#     bash results/cifar10/run.sh DIR          DIR holds cifar-10-batches-bin, or is where it is fetched to
# The first stage is that of `python results/orders/orders.py cifar10`: leave out its line if that has run.
set -euo pipefail
python train_vq.py --preset cifar10 --data-dir $1 --base-channels 32 --channel-multipliers 1,2,2 --residual-blocks 1 --code-width 64 \
    --codebook-size 512 --batch-size 16 --steps 2000 --lr 1e-3 --eval-every 1000 --out runs/orders/cifar10/vq
python train_gpt.py --preset cifar10 --data-dir $1 --vq runs/orders/cifar10/vq/checkpoint.pt --condition class --condition-dropout 0.1 \
    --n-layer 4 --n-head 4 --n-embd 192 --dropout 0 --batch-size 32 --lr 3e-3 --warmup-steps 200 --steps 3200 --eval-every 1600 \
    --checkpoint-every 400 --out runs/gpt-cifar10-class
python sample.py --checkpoint runs/gpt-cifar10-class/best.pt --class 0,1,2,3,4,5,6,7,8,9 --count 10 --guidance 2 \
    --out results/cifar10/samples.png
cp runs/orders/cifar10/vq/log.jsonl results/cifar10/first_stage.jsonl
cp runs/orders/cifar10/vq/step-002000.png results/cifar10/reconstructions.png
cp runs/gpt-cifar10-class/log.jsonl results/cifar10/second_stage.jsonl
