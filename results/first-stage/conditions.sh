#!/usr/bin/env bash
# First stages of the conditions of §4: masks, depth maps and poses of the drawn scenes, and masks of street scenes. From the root:
#     bash results/first-stage/conditions.sh [DIR]     DIR holds {train,val}/segmentation with CamVid's 11 classes, 11 = none
set -euo pipefail
python train_vq.py --target segmentation --out runs/vq-scenes-segmentation
python train_vq.py --target depth --steps 2200 --out runs/vq-scenes-depth
python train_vq.py --target pose --out runs/vq-scenes-pose
cp runs/vq-scenes-segmentation/step-001100.png results/first-stage/segmentation.png
cp runs/vq-scenes-depth/step-002200.png results/first-stage/depth.png
cp runs/vq-scenes-pose/step-001100.png results/first-stage/pose.png
for target in segmentation depth pose; do cp runs/vq-scenes-$target/log.jsonl results/first-stage/$target.jsonl; done
if [ $# -gt 0 ]; then
    python train_vq.py --data folder --data-dir $1 --target segmentation --void-label 11 --image-size 128 --upscale --flip \
        --channel-multipliers 1,2,4,4 --codebook-size 1024 --code-width 64 --steps 2500 --lr 2e-3 --eval-every 250 --workers 0 \
        --out runs/vq-streets-segmentation
    cp runs/vq-streets-segmentation/log.jsonl results/first-stage/streets.jsonl
    python results/first-stage/whole_masks.py runs/vq-streets-segmentation/checkpoint.pt $1
fi
