"""How many pictures a second are loaded at 256×256 from JPEGs as large as ImageNet's, with 0, 1 and 2 workers.

    python results/speed/loading.py

Smooth noise of 500×375 pixels, about 80 kB each in quality 85, so that decoding costs what photographs cost.
One thread a process. A round loads all of them once with every number of workers; medians over the rounds.
Seconds of the process's own processor time, beside those of the clock, do not depend on what else is running.
"""
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402

PICTURES, ROUNDS, WORKERS = 256, 5, (0, 1, 2)


def write_pictures(folder: Path) -> float:
    """Returns their mean size in kB."""
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), np.uint8))
        picture = coarse.resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:04d}.jpg", quality=85)
    return statistics.mean(file.stat().st_size for file in folder.iterdir()) / 1e3


def images_per_second(dataset, workers: int, clock: Callable[[], float]) -> float:
    """After the first batches, so that neither the workers' start counts nor what they had ready by then."""
    items = data.fixed_batches(len(dataset), 8, (0, 0))
    batches = data.load(dataset, items, torch.device("cpu"), workers)
    for _ in range(1 + 4 * workers):
        next(batches)
    began = clock()
    count = sum(len(batch["image"]) for batch in batches)
    return count / (clock() - began)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            (Path(folder) / split).mkdir()
        size = write_pictures(Path(folder) / "train")
        Image.new("RGB", (300, 300)).save(Path(folder) / "val" / "a.png")
        dataset = data.open_dataset("folder", folder, "train", data.Preparation(256, flip=True))
        rates = {f"{workers} workers": [] for workers in WORKERS} | {"a core": []}
        for _ in range(ROUNDS):
            for workers in WORKERS:
                rates[f"{workers} workers"].append(images_per_second(dataset, workers, time.perf_counter))
            rates["a core"].append(images_per_second(dataset, 0, time.process_time))
    print(f"{PICTURES} JPEGs of 500×375, {size:.0f} kB each → 256×256, {ROUNDS} rounds")
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} images/s "
              f"(single rounds {min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
