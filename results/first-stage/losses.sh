#!/usr/bin/env bash
# The same first stage on CIFAR-10 with L1 only, with LPIPS, and with LPIPS and the discriminator. From the repository's root:
#     bash results/first-stage/losses.sh DIR LPIPS.pth     DIR holds cifar-10-batches-bin; the VGG16 weights ("" fetches them)
set -euo pipefail
train() {
    python train_vq.py --preset cifar10 --data-dir "$1" --perceptual vgg16 --perceptual-weights "$2" --base-channels 32 \
        --channel-multipliers 1,2,4 --residual-blocks 1 --code-width 64 --steps 3000 --batch-size 16 --lr 1e-3 --warmup-steps 100 \
        --restart-every 25 --log-every 50 --eval-every 1500 --checkpoint-every 500 "${@:3}"
}
train "$1" "$2" --perceptual-weight 0 --out runs/vq-cifar10-l1
train "$1" "$2" --out runs/vq-cifar10-lpips
train "$1" "$2" --discriminator-weight 0.8 --discriminator-layers 2 --out runs/vq-cifar10-gan
