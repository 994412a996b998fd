#!/usr/bin/env bash
# The multiscale prior, and completion by models of one scale. From the repository's root, after results/conditions/judge.py and
# `python results/orders/orders.py scenes`:
#     bash results/multiscale/run.sh
set -euo pipefail
run=runs/multiscale/scales
python train_gpt.py --multiscale --steps 2400 --out $run
cp $run/log.jsonl results/multiscale/log.jsonl
cp $run/loss-map.png results/multiscale/loss_map.png
python results/multiscale/measure.py $run/checkpoint.pt \
    runs/orders/scenes/{row,spiral,subsample}-0/checkpoint.pt
# Three validation scenes as files, to be completed.
python - <<'END'
from PIL import Image
import scenes
for i in (2, 5, 7):
    Image.fromarray(scenes.draw_scene("val", i, 32).image).save(f"runs/scene-{i}.png")
END
python sample.py --checkpoint $run/checkpoint.pt --scales-from runs/scene-2.png --count 6 \
    --out results/multiscale/scales.png
for order in row spiral subsample; do
    mkdir -p runs/scenes
    cp runs/scene-*.png runs/scenes/
    python sample.py --checkpoint runs/orders/scenes/$order-0/checkpoint.pt --complete runs/scenes --hide --count 4 \
        --out results/multiscale/completion_$order.png
done
python sample.py --checkpoint $run/checkpoint.pt --count 8 --out runs/multiscale/samples.png \
    --animate results/multiscale/scales.gif
