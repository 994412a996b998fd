"""Kill a tiny run at random moments, restart it with --resume, and look at what it left.

    python results/faults/storm.py --kills 100

A cycle is a first stage, the code cache and a second stage, each with a checkpoint after every step, on
pictures of 16×16 in a folder. It is started again until it has come to its end, then the next begins anew.
After each kill every checkpoint must be readable and every code cache the same, byte for byte, as that of a
cycle that nobody killed; at its end a cycle must have that one's weights, and have left no unfinished file.
"""
import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else who asks for a GPU cannot fork any more
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import train_gpt  # noqa: E402
import train_vq  # noqa: E402
from outputs import load_checkpoint  # noqa: E402

SHARED = "--resume --data folder --batch-size 4 --log-every 1 --checkpoint-every 1 --workers 0 --device cpu".split()
FIRST_STAGE = ("--steps 8 --eval-every 8 --image-size 16 --base-channels 8 --channel-multipliers 1,2 "
               "--codebook-size 16 --code-width 4 --restart-every 3").split()
SECOND_STAGE = "--steps 8 --eval-every 8 --views 3 --n-layer 1 --n-head 2 --n-embd 16 --top-k 10".split()


def draw_pictures(folder: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (72, 16, 16, 3), np.uint8)
    for i, picture in enumerate(pixels):
        path = folder / ("val" if i < 8 else "train") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def run_cycle(pictures: Path, folder: Path):
    """Both stages, to their end, from wherever the last attempt was stopped."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # its errors are seen
    data = ["--data-dir", str(pictures)]
    vq = train_vq.main([*SHARED, *FIRST_STAGE, *data, "--out", str(folder / "vq")])
    train_gpt.main([*SHARED, *SECOND_STAGE, *data, "--vq", str(vq), "--codes-dir", str(folder / "codes"),
                    "--out", str(folder / "gpt")])


def start(*work) -> multiprocessing.Process:
    """A process that has torch imported already, so that the moments are spread over the work."""
    server = multiprocessing.get_context("forkserver")  # some of torch's threads do not survive a plain fork
    server.set_forkserver_preload(["train_gpt", "torch._dynamo"])  # an optimizer imports it
    process = server.Process(target=work[0], args=work[1:])
    process.start()
    return process


def what_was_interrupted(folder: Path) -> str:
    """Told by the unfinished file that is there, or by what is there already."""
    if list(folder.glob("codes/*.part")):
        return "writing the code cache"
    if list(folder.glob("*/*.part")):
        return "writing a checkpoint, a log or a picture"
    return "training the second stage" if (folder / "gpt").exists() else "training the first stage"


def faults(folder: Path, whole: Path) -> list[str]:
    """Checkpoints that cannot be read, and code caches that are not the whole ones."""
    found = []
    for kind in ("vq", "gpt"):
        try:
            load_checkpoint(folder / kind / "checkpoint.pt", kind)
        except FileNotFoundError:
            pass  # none yet
        except ValueError as error:
            found.append(str(error))
    for path in folder.glob("codes/*.npy"):
        if path.read_bytes() != (whole / "codes" / path.name).read_bytes():
            found.append(f"{path} is not whole")
    return found


def differences(folder: Path, whole: Path) -> list[str]:
    """What a cycle that was killed and resumed ended with otherwise than the one that was not."""
    found = [f"{path} was left" for path in folder.rglob("*.part")]
    for kind in ("vq", "gpt"):
        one, other = (load_checkpoint(place / kind / "checkpoint.pt", kind)["model"] for place in (folder, whole))
        found += [f"{kind} {name} differs" for name in one if not torch.equal(one[name], other[name])]
    return found


def storm(place: Path, kills: int, seed: int = 0) -> tuple[Counter, Counter, list[str]]:
    """What was interrupted how often, how many cycles came to their end, and all that was wrong."""
    draw_pictures(place / "pictures")
    whole, folder = place / "whole", place / "cycle"
    start(int).join()  # torch is imported now
    began = time.perf_counter()
    start(run_cycle, place / "pictures", whole).join()
    duration = time.perf_counter() - began
    moments, interrupted, ended, wrong = random.Random(seed), Counter(), Counter(), []
    while sum(interrupted.values()) < kills or folder.exists():  # the last cycle comes to its end
        process = start(run_cycle, place / "pictures", folder)
        process.join(moments.uniform(0, duration) if sum(interrupted.values()) < kills else None)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            interrupted[what_was_interrupted(folder)] += 1
            wrong += faults(folder, whole)
        else:
            ended[process.exitcode] += 1
            wrong += differences(folder, whole) if process.exitcode == 0 else [f"status {process.exitcode}"]
            shutil.rmtree(folder, ignore_errors=True)
    return interrupted, ended, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        interrupted, ended, wrong = storm(Path(place), flags.kills, flags.seed)
    print("| kill -9 while | times |\n| --- | --- |")
    for name, times in interrupted.most_common():
        print(f"| {name} | {times} |")
    print(f"\n{ended[0]} cycles came to their end in {time.perf_counter() - began:.0f} s; unreadable, half, lost, "
          f"left over or different: {len(wrong)}")
    for sentence in wrong:
        print(sentence)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
