"""Tables and pictures of losses.sh: three first stages that differ in nothing but their losses.

    python results/first-stage/compare.py DIR LPIPS.pth    DIR holds cifar-10-batches-bin; AlexNet's weights

L1 and LPIPS by VGG16, which two of them were trained with, come from the logs; LPIPS by AlexNet, which none has
seen, is computed here over the 10,000 test pictures. Writes reconstructions.png and curves.png beside itself.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository

import data
import run
from losses import PerceptualLoss
from vq import VQ, VQConfig

RUNS = {"l1": ("L1", "black"), "lpips": ("L1 + LPIPS", "blue"), "gan": ("L1 + LPIPS + discriminator", "red")}
WIDTH, HEIGHT, MARGIN = 420, 240, 44


def chart(title: str, curves: list[tuple[list[float], list[float], str]], mark: float) -> Image.Image:
    """Curves of x, y and colour from the first tenth's end on, with their range, and a line at x = `mark`."""
    last = max(x[-1] for x, _, _ in curves)
    curves = [([a for a in x if a >= last / 10], [b for a, b in zip(x, y) if a >= last / 10], colour)
              for x, y, colour in curves]
    low, high = min(min(y) for _, y, _ in curves), max(max(y) for _, y, _ in curves)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return (MARGIN + x / last * (WIDTH - MARGIN - 12),
                HEIGHT - 24 - (y - low) / (high - low) * (HEIGHT - 56))

    draw.line([place(mark, low), place(mark, high)], fill="silver")
    for x, y, colour in curves:
        draw.line([place(a, b) for a, b in zip(x, y)], fill=colour, width=2)
    draw.text((MARGIN, 8), title, fill="black")
    for value in (low, high):
        draw.text((4, place(0, value)[1] - 6), f"{value:.3g}", fill="black")
    draw.text((place(mark, low)[0], HEIGHT - 18), f"step {mark:.0f}", fill="black", anchor="ma")
    draw.text((WIDTH - 12, HEIGHT - 18), f"{last:.0f}", fill="black", anchor="ra")
    return picture


def curve(lines: list[dict], name: str, colour: str) -> tuple[list[float], list[float], str]:
    lines = [line for line in lines if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines], colour


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("weights", nargs="?", default="")
    flags = parser.parse_args()
    alexnet = PerceptualLoss(flags.weights, "alexnet")
    validation = data.open_dataset("cifar10", flags.data_dir, "val", 32)

    def batches():
        return data.load(validation, data.fixed_order(len(validation), 100), torch.device("cpu"), 0)

    shown, logs = [next(batches())[:10]], {}
    print("| losses | L1 | LPIPS, VGG16 | LPIPS, AlexNet | codes in use | ms/step |\n|---|---|---|---|---|---|")
    for name, (title, _) in RUNS.items():
        path = Path(f"runs/vq-cifar10-{name}")
        checkpoint = run.load_checkpoint(path / "checkpoint.pt", "vq")
        vq = VQ(VQConfig(**checkpoint["model_config"]))
        vq.load_state_dict(checkpoint["model"])
        logs[name] = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        (HERE / f"{name}.jsonl").write_text((path / "log.jsonl").read_text())
        lpips = sum(alexnet(images, vq(images)[0].clamp(-1, 1)).sum().item() for images in batches())
        shown.append(vq(shown[0])[0])
        for line in logs[name]:
            if "val_l1" in line:
                last = line is logs[name][-1]
                alex = f"{lpips / len(validation):.4f}" if last else ""
                print(f"| {title}, step {line['step']} | {line['val_l1']:.4f} | {line['val_lpips']:.4f} | {alex} "
                      f"| {line['codes_used']} | {logs[name][-2]['ms_per_step']:.0f} |")
    run.save_picture(run.picture_grid(torch.cat(shown), columns=10), HERE / "reconstructions.png")

    heard = next(line["step"] for line in logs["gan"] if "lambda" in line)
    both = [(logs[name], colour) for name, (_, colour) in RUNS.items()]
    panels = [chart("train L1: L1 black, + LPIPS blue, + discriminator red",
                    [curve(log, "l1", colour) for log, colour in both], heard),
              chart("train LPIPS, VGG16",
                    [curve(log, "perceptual", colour) for log, colour in both[1:]], heard),
              chart("mean logits of the discriminator: real green, reconstructed orange",
                    [curve(logs["gan"], "logits_real", "green"), curve(logs["gan"], "logits_fake", "orange")],
                    heard),
              chart("adaptive weight of the discriminator's gradient",
                    [curve(logs["gan"], "lambda", "red")], heard)]
    picture = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % 2 * WIDTH, i // 2 * HEIGHT))
    run.save_picture(picture, HERE / "curves.png")


if __name__ == "__main__":
    main()
