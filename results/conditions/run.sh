#!/usr/bin/env bash
# One model for each condition, and how well its samples follow it. From the repository's root, an hour on one core:
#     bash results/conditions/run.sh
set -euo pipefail
python results/conditions/judge.py
for condition in segmentation depth pose; do
    run=runs/conditions/$condition
    python train_gpt.py --condition $condition --out $run
    python results/conditions/measure.py $run/checkpoint.pt
    cp $run/log.jsonl results/conditions/$condition.jsonl
    python sample.py --checkpoint $run/checkpoint.pt --count 24 --out results/conditions/$condition.png
done
run=runs/conditions/class
python train_gpt.py --condition class --condition-dropout 0.1 --steps 2400 --out $run
python results/conditions/measure.py $run/checkpoint.pt 1 1.5 2 3
cp $run/log.jsonl results/conditions/class.jsonl
python sample.py --checkpoint $run/checkpoint.pt --class ball,house,tree,tent --guidance 2 --count 6 \
    --out results/conditions/class.png
