#!/usr/bin/env bash
# Five models that differ in nothing but the order of their codes, and the README's pictures. From the repository's root:
#     bash results/five-orders/run.sh
set -euo pipefail
for order in row spiral zcurve subsample alternate; do
    python train_gpt.py --order $order
    cp runs/gpt-demo-scenes-$order/log.jsonl results/five-orders/$order.jsonl
done
cp runs/vq-demo-scenes/log.jsonl results/five-orders/first_stage.jsonl
cp runs/vq-demo-scenes/step-001100.png results/five-orders/reconstructions.png
cp runs/gpt-demo-scenes-row/step-002300.png results/five-orders/samples_row.png
cp runs/gpt-demo-scenes-spiral/loss-map.png results/five-orders/loss_map_spiral.png
python results/five-orders/figure.py runs/gpt-demo-scenes-{row,spiral,zcurve,subsample,alternate}/checkpoint.pt \
    results/five-orders/five_orders.png
python sample.py --checkpoint runs/gpt-demo-scenes-spiral/checkpoint.pt --count 8 --out runs/spiral.png \
    --animate results/five-orders/spiral.gif
