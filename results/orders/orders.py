"""Fig. 2: five orders × three seeds, and curves of their validation loss.

    python results/orders/orders.py scenes                        trains what is missing, then draws
    python results/orders/orders.py scenes-long --seeds 1         three times the demo's steps
    python results/orders/orders.py cifar10 --data-dir data       8×8 codes, two downsamplings

Of one seed all orders have the same initial weights, batches and number of steps; all use one first stage.
Leaves NAME.json (validation nats/token by order, seed and step) and NAME.png here, and prints the table.
"""
import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from orderings import ORDERINGS
from outputs import save_picture

COLOURS = defaultdict(lambda: "#777777", row="#000000", spiral="#d62728", zcurve="#2ca02c", subsample="#1f77b4",
                      alternate="#ff7f0e")
GPT = "--n-layer 4 --n-head 4 --n-embd 160 --dropout 0 --batch-size 16 --lr 3e-3 --warmup-steps 100".split()
FLAGS = {  # of train_vq.py, of train_gpt.py
    "scenes": (["--preset", "demo"], ["--preset", "demo", "--eval-every", "190"]),
    "scenes-long": ("--preset demo --quantize-after 0 --steps 3300 --eval-every 1650".split(), "--preset demo --steps 5700 --eval-every 570".split()),
    "cifar10": ("--preset cifar10 --base-channels 32 --channel-multipliers 1,2,2 --residual-blocks 1 --code-width 64 "
                "--codebook-size 512 --batch-size 16 --steps 2000 --lr 1e-3 --eval-every 1000".split(),
                ["--preset", "cifar10", *GPT, *"--views 1 --steps 2000 --eval-every 400".split()])}


def train(script: str, flags: list[str], out: Path):
    """Run a training script, or go on with what it has begun."""
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    subprocess.run([sys.executable, ROOT / script, *flags, "--out", out, *resume], check=True)


def validation_losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["val"] for line in lines if "val" in line}


def draw_curves(curves: dict[str, list[dict[int, float]]], path: Path):
    """Mean over the seeds, with a band from minimum to maximum; the first evaluation is left out."""
    width, height, left, top, right, bottom = 900, 560, 70, 20, 880, 510
    steps = list(curves["row"][0])[1:]
    values = [run[step] for runs in curves.values() for run in runs for step in steps]
    low, high = min(values), max(values)

    def place(step: int, value: float) -> tuple[float, float]:
        return (left + (right - left) * (step - steps[0]) / (steps[-1] - steps[0]),
                bottom - (bottom - top) * (value - low) / (high - low))

    picture = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(15)
    for order, runs in curves.items():
        each = [[run[step] for run in runs] for step in steps]
        edge = [place(step, min(some)) for step, some in zip(steps, each)]
        edge += [place(step, max(some)) for step, some in zip(steps, each)][::-1]
        band = Image.new("L", picture.size)
        ImageDraw.Draw(band).polygon(edge, fill=60)
        picture.paste(Image.new("RGB", picture.size, COLOURS[order]), mask=band)
    draw = ImageDraw.Draw(picture)
    for i, (order, runs) in enumerate(curves.items()):
        mean = [place(step, statistics.mean(run[step] for run in runs)) for step in steps]
        draw.line(mean, fill=COLOURS[order], width=3)
        draw.line([(right - 150, 40 + 24 * i), (right - 120, 40 + 24 * i)], fill=COLOURS[order], width=3)
        draw.text((right - 110, 40 + 24 * i), order, fill="black", anchor="lm", font=font)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for i in range(6):
        value = low + (high - low) * i / 5
        draw.text((left - 8, place(steps[0], value)[1]), f"{value:.2f}", fill="black", anchor="rm", font=font)
    for step in steps[::2]:
        draw.text((place(step, low)[0], bottom + 16), str(step), fill="black", anchor="mm", font=font)
    draw.text(((left + right) / 2, height - 16), "training steps · validation loss in nats/token",
              fill="black", anchor="mm", font=font)
    save_picture(picture, path)


def print_table(curves: dict[str, list[dict[int, float]]]):
    last = {order: [run[max(run)] for run in runs] for order, runs in curves.items()}
    print("| order | nats/token, mean | minimum to maximum | minus row, by seed |\n| --- | --- | --- | --- |")
    for order, values in sorted(last.items(), key=lambda item: statistics.mean(item[1])):
        differences = ", ".join(f"{value - row:+.3f}" for value, row in zip(values, last["row"]))
        print(f"| {order} | {statistics.mean(values):.3f} | {min(values):.3f} to {max(values):.3f} | {differences} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FLAGS)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/orders"), help="folder of the runs")
    arguments = parser.parse_args()
    where = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    runs, (vq_flags, gpt_flags) = arguments.runs / arguments.name, FLAGS[arguments.name]
    train("train_vq.py", [*vq_flags, *where], runs / "vq")
    curves = {order: [] for order in ORDERINGS}
    for seed in range(arguments.seeds):
        for order in ORDERINGS:
            out = runs / f"{order}-{seed}"
            train("train_gpt.py", [*gpt_flags, *where, "--vq", runs / "vq" / "checkpoint.pt", "--order", order,
                                   "--seed", str(seed), "--codes-dir", runs / "codes"], out)
            curves[order].append(validation_losses(out))
    here = Path(__file__).parent
    (here / f"{arguments.name}.json").write_text(json.dumps(curves))
    draw_curves(curves, here / f"{arguments.name}.png")
    print_table(curves)


if __name__ == "__main__":
    main()
