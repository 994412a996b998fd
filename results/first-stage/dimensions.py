"""In how many dimensions do a first stage's latents vary? 1: all of them lie on a line.

    python results/first-stage/dimensions.py CHECKPOINT …

The participation ratio (Σλ)² / Σλ² of the eigenvalues λ of the latents' covariance, over 256 validation pictures, and each
of the first four λ's share. Beside them the L1 and the codebook's perplexity of the last evaluation.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
from codebook import as_vectors
from stages import FirstStage

for path in map(Path, sys.argv[1:]):
    stage = FirstStage.load(path)
    dataset = data.open_dataset(stage.trained_on["data"], stage.trained_on["data_dir"], "val", stage.preparation)
    images = next(data.load(dataset, data.fixed_batches(256, 256), torch.device("cpu"), 0))["image"]
    eigenvalues = torch.linalg.eigvalsh(as_vectors(stage.vq.latents(data.as_input(images, "image", 3))).T.cov()).flip(0)
    ratio = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    shares = " ".join(f"{share:.3f}" for share in (eigenvalues / eigenvalues.sum())[:4].tolist())
    last = json.loads(path.with_name("log.jsonl").read_text().splitlines()[-1])
    print(f"{path} L1 {last['val_l1']:.4f}, perplexity {last['perplexity']:.0f}, {ratio:.2f} dimensions ({shares})")
