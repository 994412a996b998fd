"""What a checkpoint means: frozen first stages, and a prior to sample from.

    FirstStage    pictures, masks, depth maps or poses ↔ a grid of codes (§2, §4)
    Prior         a GPT, the layout of its tokens, and the first stages that give them a meaning (§3, §4)

From a script:

    from pathlib import Path
    from outputs import picture_grid, save_picture
    from stages import Prior

    prior = Prior.load("runs/gpt-demo-scenes-row/checkpoint.pt")
    pictures = prior.pictures(prior.sample(4))  # (4, 3, H, W) in [−1, 1]
    codes = prior.image.encode(pictures)  # (4, h, w) int64
    codes[:, 0] = codes[:, -1]  # copy the bottom row to the top
    save_picture(picture_grid(prior.image.decode(codes), columns=4), Path("edited.png"))

Symbols: B batch, N pictures of a data set, C channels, H×W pixels, h×w code grid, T image tokens.
"""
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import data
import run
import taming
from codebook import as_vectors
from files import Preparation
from gpt import GPT, GPTConfig, Sampling
from orderings import ORDERINGS, TokenLayout
from outputs import announce, load_checkpoint
from vq import VQ, Palette, VQConfig, memory_format


class FirstStage:
    """An autoencoder or palette, its field ("image", "segmentation", "depth", "pose") and preparation."""

    def __init__(self, vq: VQ | Palette, field: str, preparation: Preparation, trained_on: dict):
        """`trained_on` names the data set, its folder and its digest; empty for the authors' files."""
        self.vq, self.field, self.trained_on = vq, field, trained_on
        segments = vq.config.image_channels if field == "segmentation" else 0
        self.preparation = replace(preparation, segments=segments)  # other labels are refused
        self.side = preparation.size // vq.config.downsampling  # h = w
        self.codebook_size = vq.config.codebook_size

    @classmethod
    def load(cls, path: str | Path, field: str = "image") -> "FirstStage":
        """From a checkpoint of train_vq.py, or a file of the authors'.

        The authors' files do not store the size of the pictures. 16×16 codes are assumed: 256×256 pixels for
        f16; smaller pictures are enlarged, as in the authors' data sets. Raises FileNotFoundError, or
        ValueError for another file, or a first stage of another field.
        """
        if taming.recognizes(path):
            vq = VQ.from_taming(path).eval().requires_grad_(False)
            stage = cls(vq, "image", Preparation(16 * vq.config.downsampling, upscale=True), {})
        else:
            state = load_checkpoint(path, "vq")
            if not state.get("quantizes", True):  # older files do not say
                raise ValueError(f"{path} has no codes yet: go on with train_vq.py --resume")
            stage = cls.from_state(state)
        channels = stage.vq.config.image_channels
        if stage.field != field or field == "image" and channels != 3:
            wanted = f"{field} in 3" if field == "image" else field
            raise ValueError(f"{path} is a first stage of {stage.field} in {channels} channels, not of "
                             f"{wanted}; train one with train_vq.py --target {field}")
        return stage

    @classmethod
    def of_pixels(cls, config: Any, preparation: Preparation, process: run.Process) -> "FirstStage":
        """The pixel baseline (§2): 512 colours, k-means of up to 250,000 pixels of 1,024 training crops."""
        colours = torch.rand(512, 3)  # kept by a benchmark; otherwise rank 0's replace them
        if process.rank == 0 and not config.benchmark:
            dataset = data.open_dataset(config.data, config.data_dir, "train", preparation)
            items = data.training_batches(len(dataset), 1024, config.seed)
            images = next(data.load(dataset, items, process.device, 0))["image"]  # (1024, 3, S, S)
            colours = Palette.fit(as_vectors(data.as_input(images, "image", 3)), 512).colours
        return cls(Palette(process.share(colours.cpu())[0]), "image", preparation, {})

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether train_vq.py's checkpoint is there, and has had all its steps."""
        checkpoint = load_checkpoint(path, "vq") if path.exists() else None
        return checkpoint is not None and checkpoint["step"] >= checkpoint["config"]["steps"]

    @classmethod
    def from_state(cls, state: dict) -> "FirstStage":
        """The inverse of `state`."""
        weights = state["model"]
        vq = Palette(weights["colours"]) if "colours" in weights else VQ(VQConfig(**state["model_config"]))
        vq.load_state_dict(weights)
        vq.eval().requires_grad_(False)
        return cls(vq, state["target"], Preparation(**state["preparation"]), state["trained_on"])

    def to(self, device: torch.device | str) -> "FirstStage":
        self.vq.to(device, memory_format=memory_format(torch.device(device)))
        return self

    def was_trained_on(self, name: str, directory: str) -> bool:
        """Whether it was trained on these files, wherever they lie, or on this folder before it changed."""
        known, dataset = self.trained_on, data.open_dataset(name, directory, "train", self.preparation)
        same = dataset.digest() == known["digest"]
        in_place = (known["data"], Path(known["data_dir"]).resolve()) == (name, Path(directory).resolve())
        if in_place and not same:
            announce(f"pictures in {directory} have changed since its first stage was trained")
        return in_place or same

    def state(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        return {"model_config": asdict(self.vq.config), "model": self.vq.state_dict(), "target": self.field,
                "preparation": asdict(self.preparation), "trained_on": self.trained_on}

    def hash(self) -> str:
        """SHA-256 of the network: of its config and of every weight's name and value."""
        digest = hashlib.sha256(json.dumps(asdict(self.vq.config), sort_keys=True).encode())
        for name, weight in sorted(self.vq.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().numpy().tobytes())  # in row-major order, whatever the memory format
        return digest.hexdigest()

    def encode(self, values: Tensor) -> Tensor:
        """The field of a batch as `data.load` or `data.read_field` gives it → codes (B, h, w) int64.

        Pictures may be floats in [−1, 1] as well.
        """
        values = values.to(next(self.vq.parameters()).device)
        return self.vq.encode(data.as_input(values, self.field, self.vq.config.image_channels))

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) → pictures to look at (B, 1 or 3, H, W), near [−1, 1]; masks in colours."""
        with run.autocast(codes.device):
            return data.as_pictures(self.vq.decode(codes), self.field)

    def pyramid(self, codes: Tensor, scales: tuple[int, ...]) -> list[Tensor]:
        """codes (B, h, w) → grids coarse to fine, (B, s, s) for each s of the scales, then the codes; §3."""
        return [*(self.vq.requantize(codes, scale) for scale in scales), codes]


Stages = dict[str, FirstStage | None]  # by field, "image" first; None for a class, which needs none


def stages_from_state(states: dict[str, dict | None]) -> Stages:
    """The first stages in a checkpoint of train_gpt.py."""
    return {field: state and FirstStage.from_state(state) for field, state in states.items()}


class Prior:
    """A GPT over code tokens with all that turns them into pictures. Samples under the run's autocast."""

    def __init__(self, gpt: GPT, layout: TokenLayout, stages: Stages, trained_on: dict):
        """`trained_on` names the data set, its folder, digest and classes; empty for the authors' files."""
        self.gpt, self.layout, self.stages, self.trained_on = gpt, layout, stages, trained_on
        self.image, self.classes = stages["image"], trained_on.get("classes", [])
        self.condition = next((field for field in stages if field != "image"), None)

    @property
    def device(self) -> torch.device:
        return self.gpt.head.weight.device

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", n_head: int = 0) -> "Prior":
        """From a checkpoint of train_gpt.py, or an unconditional file of the authors'.

        Raises FileNotFoundError, or ValueError for another file. `n_head`: see `GPT.from_taming`.
        """
        if taming.recognizes(path):
            return cls.from_taming(path, n_head).to(device)
        checkpoint = load_checkpoint(path, "gpt")
        gpt = GPT(GPTConfig(**checkpoint["model_config"]))
        gpt.load_state_dict(checkpoint["model"])
        return cls(gpt.eval(), TokenLayout(**checkpoint["layout"]), stages_from_state(checkpoint["stages"]),
                   checkpoint["trained_on"]).to(device)

    def to(self, device: torch.device | str) -> "Prior":
        for part in filter(None, (self.gpt, *self.stages.values())):
            part.to(device)
        return self

    @classmethod
    def from_taming(cls, path: str | Path, n_head: int) -> "Prior":
        """An unconditional model of theirs; its start token, code 0, is copied as the null token."""
        gpt, image = GPT.from_taming(path, n_head), FirstStage.load(path)
        if gpt.config.vocab_size != image.codebook_size:
            raise ValueError(f"{path} has a GPT of {gpt.config.vocab_size} tokens for {image.codebook_size} "
                             "codes; only unconditional models, with equal numbers, can be sampled")
        announce(f"{path} is sampled as unconditional; if it is class-conditional, which its file "
                 "does not say, all samples are of class 0")
        written = taming.writing_order(path)  # (T,)
        side = round(len(written) ** 0.5)
        names = ORDERINGS if side & (side - 1) == 0 else ("row", "spiral", "alternate")  # for any side
        order = next((name for name in names if torch.equal(ORDERINGS[name](side, side), written)), None)
        if order is None:
            raise ValueError(f"{path} writes in an order that is none of {', '.join(ORDERINGS)}")
        layout = TokenLayout(image.codebook_size, side, side, order)
        gpt.config = replace(gpt.config, vocab_size=layout.vocab_size)
        embedding, head = gpt.token_embedding.weight.detach(), gpt.head.weight.detach()
        gpt.token_embedding.weight = nn.Parameter(torch.cat([embedding, embedding[:1]]))
        gpt.head.weight = nn.Parameter(torch.cat([head, torch.zeros_like(head[:1])]))
        return cls(gpt, layout, {"image": image}, {})

    def state(self) -> dict:
        """Plain values and tensors, for a checkpoint."""
        return {"model_config": asdict(self.gpt.config), "model": self.gpt.state_dict(),
                "layout": asdict(self.layout), "trained_on": self.trained_on,
                "stages": {field: stage and stage.state() for field, stage in self.stages.items()}}

    def tokens(self, codes: dict[str, np.ndarray], index: list[int], dropout: float = 0.0) -> Tensor:
        """GPT input of pictures `index` of codes (arrays or `cache.Views`): (B, P + T) int64 on its device.

        `dropout`: the share of sequences whose condition is replaced by the null token.
        """
        chosen = {field: torch.from_numpy(array[index].astype(np.int64)) for field, array in codes.items()}
        condition = chosen.get(self.condition)  # (B, h, w), (B,) or None
        if dropout:
            dropped = torch.rand(len(index), 1) < dropout  # (B, 1)
            condition = condition.reshape(len(index), -1).masked_fill(dropped, -1)  # (B, P)
        grids = self.image.pyramid(chosen["image"].to(self.device, non_blocking=True), self.layout.scales)
        return self.layout.tokens(grids, condition)

    def sample(self, count: int, condition: Tensor | None = None, given: Tensor | None = None,
               sampling: Sampling = Sampling(), generator: torch.Generator | None = None,
               cached: bool = True, steps: int | None = None, captured: bool = True) -> Tensor:
        """Draw image tokens (count, T) int64 in the model's own order; with `steps`: (count, G + steps).

        `condition`: labels (count,) or codes of a map (count, h, w); None: unconditional. `given` (count, G):
        the first tokens, which are kept: part of a picture to be completed, or its coarser scales.
        Raises ValueError for a condition that is not one of this model's, or guidance of a model that was
        trained without --condition-dropout.
        """
        device, guided = self.device, sampling.guidance != 1
        if guided and not (self.layout.condition_length and self.layout.null_token):
            raise run.UsageError(f"guidance is {sampling.guidance}, but this model knows no dropped "
                                 "condition: train one with --condition and --condition-dropout 0.1")
        conditions = [condition, None] if guided else [condition]
        prefixes = [self.layout.prefix(each, count).to(device) for each in conditions]  # (B, P) each
        if condition is not None and not 0 <= condition.min() <= condition.max() < self.layout.condition_size:
            raise ValueError(f"a condition has codes from {condition.min()} to {condition.max()}; this model "
                             f"knows 0 to {self.layout.condition_size - 1}")
        if given is not None:
            prefixes = [torch.cat([prefix, given.to(device)], 1) for prefix in prefixes]  # (B, P + G)
        left = self.layout.prefix_length + sum(self.layout.lengths) - prefixes[0].shape[1]  # T − G
        with run.autocast(device):
            tokens = self.gpt.generate(
                prefixes[0], left if steps is None else steps, generator=generator, null_prefix=prefixes[-1],
                sampled_tokens=self.layout.codebook_size, cached=cached, captured=captured, **vars(sampling))
        return tokens[:, self.layout.prefix_length:]  # (B, T)

    def sample_window(self, count: int, height: int, width: int, condition: Tensor | None = None,
                      sampling: Sampling = Sampling(), generator: torch.Generator | None = None) -> Tensor:
        """Draw grids larger than in training by a sliding window: codes (count, height, width) int64.

        Row by row, each code is predicted inside a window of the training size with that code as near to its
        centre as the border allows. A map's codes (count, height, width) are cut in the same way. Raises
        ValueError for a model of another order than row, or of several scales.
        """
        layout, h, w = self.layout, self.layout.height, self.layout.width
        if layout.order != "row" or layout.scales or height < h or width < w:
            raise run.UsageError(f"a grid of {height}×{width} codes needs a model of one scale in the order "
                                 f"row, not {layout.order} with scales {layout.scales}, and at least {h}×{w} "
                                 "codes")
        grid = torch.zeros(count, height, width, dtype=torch.int64, device=self.device)
        for y in range(height):
            for x in range(width):
                # Of the two middle columns the left one, which sees farther to the right in the row above.
                top, left = min(max(y - h // 2, 0), height - h), min(max(x - (w - 1) // 2, 0), width - w)
                window = (slice(None), slice(top, top + h), slice(left, left + w))
                known = grid[window].flatten(1)[:, :(y - top) * w + x - left]  # (B, G)
                part = condition[window] if condition is not None and condition.ndim == 3 else condition
                grid[:, y, x] = self.sample(count, part, known, sampling, generator, steps=1)[:, -1]
        return grid

    def pictures(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, T) → the pictures of the finest grid, (B, C, H, W) float32 near [−1, 1]."""
        return self.image.decode(self.layout.grids(tokens)[-1])
