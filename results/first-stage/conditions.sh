#!/usr/bin/env bash
# First stages of the conditions of §4: masks, depth maps and poses of the drawn scenes. From the root:
#     bash results/first-stage/conditions.sh
set -euo pipefail
python train_vq.py --target segmentation --quantize-after 0 --out runs/vq-scenes-segmentation
python train_vq.py --target depth --quantize-after 0 --steps 2200 --out runs/vq-scenes-depth
python train_vq.py --target pose --quantize-after 0 --out runs/vq-scenes-pose
cp runs/vq-scenes-segmentation/step-001100.png results/first-stage/segmentation.png
cp runs/vq-scenes-depth/step-002200.png results/first-stage/depth.png
cp runs/vq-scenes-pose/step-001100.png results/first-stage/pose.png
for target in segmentation depth pose; do cp runs/vq-scenes-$target/log.jsonl results/first-stage/$target.jsonl; done
