#!/usr/bin/env bash
# Photographs of clothes, ten classes, 64×64 → 8×8 of 512 codes, on one CPU core. From the repository's root:
#     bash results/clothing/run.sh PHOTOS LPIPS      PHOTOS: {train,val}/CLASS/*.jpg; LPIPS: folder of lpips_{vgg16,alexnet}.pth
set -euo pipefail
python train_vq.py --preset demo --quantize-after 0 --data folder --data-dir $1 --image-size 64 --upscale --flip --base-channels 24 \
    --channel-multipliers 1,2,4,4 --codebook-size 512 --perceptual vgg16 --perceptual-weights $2/lpips_vgg16.pth \
    --discriminator-weight 0.2 --discriminator-start 0.6 --discriminator-ramp 0.2 --discriminator-layers 2 --batch-size 8 --steps 3000 --log-every 50 --eval-every 500 \
    --checkpoint-every 250 --workers 0 --out runs/vq-clothing
python train_gpt.py --preset demo --data folder --data-dir $1 --vq runs/vq-clothing/checkpoint.pt --condition class \
    --condition-dropout 0.1 --views 8 --workers 0 --n-layer 6 --n-head 6 --n-embd 192 --dropout 0.2 --steps 5000 --lr 1e-3 \
    --eval-every 500 --checkpoint-every 500 --out runs/gpt-clothing
# It still improved, so it was given as long again.
python train_gpt.py --preset demo --data folder --data-dir $1 --out runs/gpt-clothing --resume --steps 11000
BEST=runs/gpt-clothing/best.pt
python sample.py --checkpoint $BEST --class dress,hat,longsleeve,outwear,pants,shirt,shoes,shorts,skirt,t-shirt --count 8 --guidance 2 \
    --out results/clothing/samples.jpg
for class in dress pants shoes; do
    mkdir -p runs/clothing-$class && cp $(ls $1/val/$class/*.jpg | head -2) runs/clothing-$class/
    python sample.py --checkpoint $BEST --class $class --complete runs/clothing-$class/ --hide --count 5 --out results/clothing/completion-$class.png
done
python results/clothing/nearest.py $BEST $1 $2/lpips_alexnet.pth results/clothing/nearest.png
cp runs/vq-clothing/log.jsonl results/clothing/first_stage.jsonl
cp runs/gpt-clothing/log.jsonl results/clothing/second_stage.jsonl
cp runs/vq-clothing/step-003000.png results/clothing/reconstructions.png
