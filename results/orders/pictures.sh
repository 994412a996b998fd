#!/usr/bin/env bash
# The README's pictures, from the models of seed 0. From the repository's root, after `python results/orders/orders.py` for scenes-long and scenes:
#     bash results/orders/pictures.sh
set -euo pipefail
python results/orders/figure.py runs/orders/scenes-long/{row,spiral,zcurve,subsample,alternate}-0/checkpoint.pt results/orders/five_orders.png
python sample.py --checkpoint runs/orders/scenes-long/spiral-0/checkpoint.pt --count 8 --out runs/spiral.png --animate results/orders/spiral.gif
cp runs/orders/scenes-long/spiral-0/loss-map.png results/orders/loss_map_spiral.png
cp runs/orders/scenes-long/row-0/step-005700.png results/orders/samples_row_long.png
cp runs/orders/scenes/row-0/step-001900.png results/orders/samples_row.png
cp runs/orders/scenes/vq/step-001100.png results/orders/reconstructions.png
cp runs/orders/scenes/vq/log.jsonl results/orders/first_stage.jsonl
