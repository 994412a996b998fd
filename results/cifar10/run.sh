#!/usr/bin/env bash
# CIFAR-10 with all 60,000 pictures, scaled down to two CPU cores. From the repository's root:
#     bash results/cifar10/run.sh DIR          DIR holds cifar-10-batches-bin, or is where it is fetched to
set -euo pipefail
python train_vq.py --preset cifar10 --data-dir $1 --base-channels 32 --residual-blocks 1 --code-width 64 --steps 1000 --batch-size 16 \
    --lr 1e-3 --warmup-steps 100 --restart-every 25 --eval-every 1000 --checkpoint-every 500 --out runs/vq-cifar10-short
python train_gpt.py --preset cifar10 --data-dir $1 --vq runs/vq-cifar10-short/checkpoint.pt --views 1 --n-layer 4 --n-embd 192 --n-head 3 \
    --dropout 0 --steps 600 --batch-size 16 --lr 1.5e-3 --warmup-steps 100 --eval-every 600 --checkpoint-every 300 \
    --out runs/gpt-cifar10-short
cp runs/vq-cifar10-short/log.jsonl results/cifar10/first_stage.jsonl
cp runs/vq-cifar10-short/step-001000.png results/cifar10/reconstructions.png
cp runs/gpt-cifar10-short/log.jsonl results/cifar10/second_stage.jsonl
cp runs/gpt-cifar10-short/step-000600.png results/cifar10/samples.png
