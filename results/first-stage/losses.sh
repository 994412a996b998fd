#!/usr/bin/env bash
# The same first stage on CIFAR-10 with L1 only, with LPIPS, and with LPIPS and the discriminator, of two weights. From the root:
#     bash results/first-stage/losses.sh DIR VGG16.pth ALEXNET.pth     DIR holds cifar-10-batches-bin, the others LPIPS's weights
set -euo pipefail
export OMP_NUM_THREADS=1  # so that sums round alike, and runs agree bit for bit until their losses differ
train() {
    python train_vq.py --preset cifar10 --data-dir $data --perceptual vgg16 --perceptual-weights $vgg16 --base-channels 32 \
        --channel-multipliers 1,2,4 --residual-blocks 1 --code-width 64 --steps 3000 --batch-size 16 --lr 1e-3 --warmup-steps 100 \
        --restart-every 25 --log-every 50 --eval-every 1500 --checkpoint-every 500 "$@"
}
data=$1 vgg16=$2 alexnet=$3
train --perceptual-weight 0 --out runs/vq-cifar10-l1
train --out runs/vq-cifar10-lpips
for weight in 0.1 0.8; do  # evaluated after the adversarial loss's first step
    train --discriminator-weight $weight --discriminator-start 0.75 --discriminator-ramp 0 --discriminator-layers 2 \
        --eval-every 2250 --out runs/vq-cifar10-gan-$weight
done
python results/first-stage/compare.py $data $alexnet
