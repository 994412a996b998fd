#!/usr/bin/env bash
# One model for each condition, and how well its samples follow it. From the repository's root, an hour on one core:
#     bash results/conditions/run.sh
set -euo pipefail
python results/conditions/judge.py
for condition in segmentation depth pose; do
    python train_gpt.py --condition $condition
    python results/conditions/measure.py runs/gpt-demo-scenes-row-$condition/checkpoint.pt
    cp runs/gpt-demo-scenes-row-$condition/log.jsonl results/conditions/$condition.jsonl
    python sample.py --checkpoint runs/gpt-demo-scenes-row-$condition/checkpoint.pt --count 24 --out results/conditions/$condition.png
done
python train_gpt.py --condition class --condition-dropout 0.1 --steps 2400
python results/conditions/measure.py runs/gpt-demo-scenes-row-class/checkpoint.pt 1 1.5 2 3
cp runs/gpt-demo-scenes-row-class/log.jsonl results/conditions/class.jsonl
python sample.py --checkpoint runs/gpt-demo-scenes-row-class/checkpoint.pt --class ball,house,tree,tent --guidance 2 --count 6 \
    --out results/conditions/class.png
