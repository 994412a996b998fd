"""The README's picture: five rank grids (Fig. 2) above five rows of samples, a column for each order.

    python results/orders/figure.py CHECKPOINT [CHECKPOINT ...] OUT.png     one checkpoint an order
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from orderings import ORDERINGS, ranks
from outputs import save_picture, to_pixels
from stages import Prior

SIDE, GAP, ROWS = 128, 12, 5


def rank_grid(order: str) -> Image.Image:
    """A 4×4 grid from dark (first) to light (last), with the step in each cell and the path drawn."""
    rank, cell = ranks(ORDERINGS[order](4, 4), 4, 4), SIDE // 4
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    for y in range(4):
        for x in range(4):
            step = int(rank[y, x])
            shade = step / 15
            box = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
            draw.rectangle(box, fill=(int(40 + 200 * shade), int(60 + 150 * shade), int(120 + 10 * shade)))
    centres = [(int(i) % 4 * cell + cell / 2, int(i) // 4 * cell + cell / 2) for i in ORDERINGS[order](4, 4)]
    draw.line(centres, fill="white", width=2)
    for step, (x, y) in enumerate(centres):
        draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill="white")
        draw.text((x, y), str(step), fill="black", anchor="mm", font=ImageFont.load_default(13))
    return picture


def samples(path: str) -> tuple[str, list[Image.Image]]:
    """The order of a checkpoint of train_gpt.py, and its first pictures with seed 0."""
    prior = Prior.load(path, torch.device("cpu"))
    images = prior.pictures(prior.sample(ROWS, generator=torch.Generator().manual_seed(0)))
    pictures = [Image.fromarray(pixels) for pixels in to_pixels(images)]
    return prior.layout.order, [picture.resize((SIDE, SIDE), Image.Resampling.NEAREST) for picture in pictures]


def main():
    *checkpoints, out = sys.argv[1:]
    columns = [samples(path) for path in checkpoints]
    step = SIDE + GAP
    figure = Image.new("RGB", (len(columns) * step - GAP, 24 + SIDE + 2 * GAP + ROWS * step - GAP), "white")
    draw = ImageDraw.Draw(figure)
    for i, (order, pictures) in enumerate(columns):
        middle = (i * step + SIDE / 2, 10)
        draw.text(middle, order, fill="black", anchor="mm", font=ImageFont.load_default(18))
        figure.paste(rank_grid(order), (i * step, 24))
        for row, picture in enumerate(pictures):
            figure.paste(picture, (i * step, 24 + SIDE + 2 * GAP + row * step))
    save_picture(figure, Path(out))


if __name__ == "__main__":
    main()
