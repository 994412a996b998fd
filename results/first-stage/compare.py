"""Tables and pictures of losses.sh: four first stages that differ in nothing but their losses.

    python results/first-stage/compare.py DIR LPIPS.pth    DIR holds cifar-10-batches-bin; AlexNet's weights

L1 and LPIPS by VGG16, which three of them were trained with, come from the logs. Computed here over the 10,000 test
pictures: LPIPS by AlexNet, which none has seen, and sharpness, the mean difference between neighbouring pixels
as a share of the originals'. Writes reconstructions.png, curves.png and copies of the logs beside itself.
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
from losses import PerceptualLoss
from outputs import load_checkpoint, picture_grid, save_picture
from vq import VQ, VQConfig

RUNS = {"l1": ("L1", "black"), "lpips": ("L1 + LPIPS", "blue"),
        "gan-0.1": ("L1 + LPIPS + 0.1 discriminator", "red"),
        "gan-0.8": ("L1 + LPIPS + 0.8 discriminator", "magenta")}
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


def contrast(images: torch.Tensor) -> float:
    """Of pictures (B, C, H, W): sum of the differences between neighbouring pixels."""
    return sum(images.diff(dim=side).abs().sum().item() for side in (2, 3))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("weights", nargs="?", default="")
    flags = parser.parse_args()
    alexnet = PerceptualLoss(flags.weights, "alexnet")
    validation = data.open_dataset("cifar10", flags.data_dir, "val", data.Preparation(32))

    def batches():
        items = data.fixed_batches(len(validation), 100)
        for batch in data.load(validation, items, torch.device("cpu"), 0):
            yield data.as_input(batch["image"], "image", 3)

    shown, logs = [next(batches())[:10]], {}
    print("| losses | step | L1 | LPIPS, VGG16 | LPIPS, AlexNet | sharpness |\n" + "|---" * 6 + "|")
    for name, (title, _) in RUNS.items():
        path = Path(f"runs/vq-cifar10-{name}")
        checkpoint = load_checkpoint(path / "checkpoint.pt", "vq")
        vq = VQ(VQConfig(**checkpoint["model_config"]))
        vq.load_state_dict(checkpoint["model"])
        logs[name] = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        (HERE / f"{name}.jsonl").write_text((path / "log.jsonl").read_text())
        pairs = [(images, vq(images)[0].clamp(-1, 1)) for images in batches()]
        lpips = sum(alexnet(*pair).sum().item() for pair in pairs) / len(validation)
        sharpness = sum(contrast(x) for _, x in pairs) / sum(contrast(images) for images, _ in pairs)
        shown.append(pairs[0][1][:10])
        for line in logs[name]:
            if "val_l1" in line:
                known = f"{lpips:.4f} | {sharpness:.3f}" if line is logs[name][-1] else " | "
                print(f"| {title} | {line['step']:,} | {line['val_l1']:.4f} | {line['val_lpips']:.4f} | {known} |")
    save_picture(picture_grid(torch.cat(shown), columns=10), HERE / "reconstructions.png")

    start = checkpoint["adversary"]["start"]
    each = [(logs[name], colour) for name, (_, colour) in RUNS.items()]
    panels = [chart("train L1: L1 black, + LPIPS blue, + discriminator 0.1 red, 0.8 magenta",
                    [curve(log, "l1", colour) for log, colour in each], start),
              chart("train LPIPS, VGG16",
                    [curve(log, "perceptual", colour) for log, colour in each[1:]], start),
              chart("mean logits of the discriminators: real above, reconstructed below",
                    [curve(log, name, colour) for log, colour in each[2:]
                     for name in ("logits_real", "logits_fake")], start),
              chart("adaptive weight of the discriminators' gradients",
                    [curve(log, "lambda", colour) for log, colour in each[2:]], start)]
    picture = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % 2 * WIDTH, i // 2 * HEIGHT))
    save_picture(picture, HERE / "curves.png")


if __name__ == "__main__":
    main()
