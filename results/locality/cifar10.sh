#!/usr/bin/env bash
# The same on CIFAR-10: first stages of both kinds and class-conditional priors on them. From the repository's root, an hour and a half on one core:
#     bash results/locality/cifar10.sh DIR WEIGHTS          DIR: see ../cifar10/run.sh; WEIGHTS: a ResNet-20, see ../efficiency/frechet.py
set -euo pipefail
for norm in position group; do
    with="python"
    if [ $norm = position ]; then with="python results/locality/position_norm.py"; fi
    run=runs/locality-cifar10-$norm
    $with train_vq.py --preset cifar10 --data-dir $1 --base-channels 32 --channel-multipliers 1,2,2 --residual-blocks 1 --code-width 64 \
        --codebook-size 512 --batch-size 16 --steps 2000 --lr 1e-3 --eval-every 1000 --out $run/vq
    $with train_gpt.py --preset cifar10 --data-dir $1 --vq $run/vq/checkpoint.pt --condition class --condition-dropout 0.1 \
        --n-layer 4 --n-head 4 --n-embd 192 --dropout 0 --batch-size 32 --lr 3e-3 --warmup-steps 200 --steps 3200 --eval-every 800 \
        --checkpoint-every 400 --codes-dir $run/codes --out $run/gpt
    $with results/locality/measure.py $run/vq/checkpoint.pt
    $with results/cifar10/judge.py $2 $1 $run/gpt/best.pt 1 2 3
    $with sample.py --checkpoint $run/gpt/best.pt --class 0,1,2,3,4,5,6,7,8,9 --count 10 --guidance 2 --out $run/samples.png
done
