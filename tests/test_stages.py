"""First stages, and sampling from a prior.

Oracles: encoding by hand, the data set without a cache, plain sampling, and a search for the nearest window.
Random networks in float64, so that no draw depends on the order in which a BLAS sums.
"""
import dataclasses
import itertools
import shutil
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import data
import stages
from gpt import GPT, next_token_probabilities
from helpers import build, first_stage_of, seeded
from orderings import ORDERINGS, TokenLayout
from stages import FirstStage, Prior, Sampling
from vq import VQ, VQConfig


def conditions(prior: Prior, count: int, height: int = 4, width: int = 4) -> Tensor | None:
    if prior.condition == "class":
        return torch.arange(count) % 4
    return torch.randint(16, (count, height, width), generator=seeded(9)) if prior.condition else None


def test_a_first_stage_comes_back_from_its_state_frozen_and_with_the_same_hash(first_stage):
    stage = FirstStage.load(first_stage)
    copy = FirstStage.from_state(stage.state())
    assert copy.hash() == stage.hash() and copy.preparation == stage.preparation and copy.field == "image"
    assert (stage.side, stage.codebook_size, stage.preparation.size) == (8, 16, 16)
    assert not stage.vq.training and not any(weight.requires_grad for weight in stage.vq.parameters())
    config, weights = stage.vq.config, stage.vq.state_dict()
    others = [(config, weights | {name: weights[name] + 1e-3}) for name in list(weights)[::9]]
    others += [(config, {f"{name}_": weight for name, weight in weights.items()}),
               (dataclasses.replace(config, commitment_weight=0.5), weights)]
    for copy.vq.config, values in others:
        copy.vq.state_dict = lambda: values
        assert copy.hash() != stage.hash()


def test_each_field_is_encoded_as_the_network_sees_it():
    scene = data.Scenes("val", data.Preparation(8, data.FIELDS))[0, None]
    for field in data.FIELDS:
        stage, values = first_stage_of(field), torch.from_numpy(scene[field])[None]
        channels = stage.vq.config.image_channels
        if field == "segmentation":
            inputs = torch.stack([(values[0] == label).float() for label in range(channels)])[None]
            assert stage.preparation.segments == channels  # so that other labels are refused
        else:
            inputs = values[None] if field == "depth" else values / 127.5 - 1
        codes = stage.encode(values)
        assert torch.equal(codes, stage.vq.encode(inputs)) and codes.shape == (1, 4, 4)
        shown = stage.decode(codes)
        assert shown.shape == (1, 1 if field == "depth" else 3, 8, 8) and shown.isfinite().all()
        pyramid = stage.pyramid(codes, (1, 2))
        assert [len(grid[0]) for grid in pyramid] == [1, 2, 4] and torch.equal(pyramid[2], codes)
        assert torch.equal(pyramid[0], stage.vq.requantize(codes, 1))


def test_a_first_stage_of_another_field_is_refused_and_a_moved_data_set_known_again(
        first_stage, pictures, tmp_path, capsys):
    with pytest.raises(ValueError, match="is a first stage of image in 3 channels, not of depth; train one"):
        FirstStage.load(first_stage, "depth")
    masks = torch.load(first_stage, weights_only=True)
    masks["model_config"]["image_channels"], masks["target"] = 8, "image"  # as files of the authors' may be
    masks["model"] = VQ(VQConfig(**masks["model_config"])).state_dict()
    torch.save(masks, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match="is a first stage of image in 8 channels, not of image in 3;"):
        FirstStage.load(tmp_path / "masks.pt")

    assert FirstStage.is_finished(first_stage) and not FirstStage.is_finished(tmp_path / "none.pt")
    stage = FirstStage.load(first_stage)
    moved, other = tmp_path / "moved", tmp_path / "other"
    for folder in (moved, other):
        shutil.copytree(pictures, folder)
    (other / "train" / "3.png").unlink()
    assert stage.was_trained_on("folder", f"{pictures}/../{pictures.name}")
    assert stage.was_trained_on("folder", str(moved)) and not stage.was_trained_on("folder", str(other))
    assert capsys.readouterr().out == ""
    stage.trained_on = stage.trained_on | {"data_dir": str(other)}
    assert stage.was_trained_on("folder", str(other))
    assert f"pictures in {other} have changed since its first stage" in capsys.readouterr().out
    stage.trained_on = stage.trained_on | {"data_dir": str(tmp_path / "gone")}
    assert stage.was_trained_on("folder", str(moved)) and not stage.was_trained_on("folder", str(other))


def test_tokens_are_the_condition_or_null_and_then_each_grid_in_the_order():
    prior = build("depth", "spiral", (1, 2))
    codes = {field: np.random.default_rng(i).integers(0, 16, (9, 4, 4)).astype(np.uint16)
             for i, field in enumerate(("image", "depth"))}
    tokens = prior.tokens(codes, [7, 2])
    p = ORDERINGS["spiral"](4, 4).numpy()
    for row, index in zip(tokens, [7, 2]):
        assert row[:16].tolist() == (codes["depth"][index].flatten().astype(int) + 16).tolist()
        assert row[-16:].tolist() == codes["image"][index].flatten()[p].tolist()
        coarsest = prior.image.vq.requantize(torch.from_numpy(codes["image"][index].astype(int))[None], 1)
        assert row[16] == coarsest and len(row) == 16 + 1 + 4 + 16
    torch.manual_seed(0)
    many = prior.tokens(codes, [3] * 4000, dropout=0.25)[:, :16]
    null = (many == 32).all(1)
    assert 0.22 < null.double().mean() < 0.28
    assert (many[~null] == tokens.new_tensor(codes["depth"][3].flatten().astype(int) + 16)).all()
    labelled = {"image": codes["image"], "class": np.arange(9, dtype=np.uint16) % 3}
    assert build("class").tokens(labelled, [4, 5])[:, 0].tolist() == [17, 18]
    assert build().tokens({"image": codes["image"]}, [0])[:, 0].tolist() == [16]


def test_given_tokens_are_kept_and_the_rest_differs_between_seeds():
    for kind in ("none", "class", "depth"):
        prior = build(kind, "subsample", (2,))
        condition = conditions(prior, 6)
        given = torch.randint(16, (6, 11), generator=seeded(3))
        draw = [prior.sample(6, condition, given, Sampling(), seeded(seed)) for seed in (0, 0, 1)]
        assert torch.equal(draw[0], draw[1]) and draw[0].shape == (6, 20) and draw[0].max() < 16
        assert all(torch.equal(tokens[:, :11], given) for tokens in draw)
        assert ((draw[0] != draw[2])[:, 11:]).float().mean() > 0.3
        assert torch.equal(prior.sample(6, condition, draw[0]), draw[0])  # nothing is left to be drawn
        slow = prior.sample(6, condition, given, Sampling(), seeded(0), cached=False)
        assert torch.equal(slow, draw[0])
        some = prior.sample(6, condition, given, Sampling(), seeded(0), steps=3)
        assert torch.equal(some, draw[0][:, :14])
        if kind != "none":
            whole, null = (torch.cat([prior.layout.prefix(each, 6), given], 1) for each in (condition, None))
            drawn = prior.gpt.generate(whole, 9, generator=seeded(0), sampled_tokens=16, guidance=3.0,
                                       null_prefix=null)
            guided = prior.sample(6, condition, given, Sampling(guidance=3.0), seeded(0))
            assert torch.equal(guided, drawn[:, prior.layout.prefix_length:])


def test_a_condition_changes_what_is_drawn_and_guidance_how_much():
    """With guidance g the first token is drawn from the logits null + g·(conditional − null)."""
    for kind in ("class", "depth"):
        prior = build(kind)
        condition = conditions(prior, 64)
        plain, none = (prior.sample(64, given, None, Sampling(), seeded(0)) for given in (condition, None))
        assert not torch.equal(plain, none)
        prefixes = [prior.layout.prefix(c, 64) for c in (condition, None)]
        with torch.no_grad():
            conditional, null = (prior.gpt(prefix)[:, -1, :16] for prefix in prefixes)
        for guidance in (0.0, 1.0, 3.0):
            logits = null + guidance * (conditional - null)
            assert (logits.std(0).max() < 1e-4) == (guidance == 0)  # the conditions differ
            for top_k in (0, 1):
                probabilities = next_token_probabilities(logits, 1.0, top_k, 1.0)
                how = Sampling(1.0, top_k, 1.0, guidance)
                drawn = prior.sample(64, condition, None, how, seeded(0), steps=1)
                assert torch.equal(drawn, probabilities.multinomial(1, generator=seeded(0)))
    for prior in (build(), build("class", null_token=False)):
        with pytest.raises(ValueError, match="guidance is 2.0, but this model knows no dropped condition"):
            prior.sample(2, conditions(prior, 2), None, Sampling(guidance=2.0))
    for prior, codes in ((build("class"), [4, 0]), (build("class"), [-1, 0]), (build(), [0, 0])):  # of four classes
        with pytest.raises(ValueError, match="has codes from (0 to 4|-1 to 0); this model knows 0 to 3|has none"):
            prior.sample(2, torch.tensor(codes))
    for values in ({"guidance": -1.0}, {"guidance": 101.0}, {"temperature": 1e-45}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(values))} is"):
            Sampling(**values)


def nearest_start(position: int, centre: int, size: int) -> int:
    """Where a window of 4 must start so that a position in it is nearest to its centre."""
    starts = [start for start in range(size - 3) if start <= position < start + 4]
    return min(starts, key=lambda start: abs(position - start - centre))


def test_a_window_of_the_training_size_is_plain_sampling_and_larger_grids_see_the_nearest():
    for kind in ("none", "class", "depth"):
        prior = build(kind)
        condition = conditions(prior, 2)
        grid = prior.sample_window(2, 4, 4, condition, Sampling(), seeded(4))
        assert torch.equal(grid.flatten(1), prior.sample(2, condition, None, Sampling(), seeded(4)))

        condition = conditions(prior, 2, 6, 9)
        grid = torch.zeros(2, 6, 9, dtype=torch.int64)
        random = seeded(5)
        for y, x in itertools.product(range(6), range(9)):
            top, left = nearest_start(y, 2, 6), nearest_start(x, 1, 9)
            part = condition[:, top:top + 4, left:left + 4] if kind == "depth" else condition
            tokens = prior.layout.tokens([grid[:, top:top + 4, left:left + 4]], part)
            before = prior.layout.prefix_length + 4 * (y - top) + x - left
            with torch.no_grad():
                probabilities = prior.gpt(tokens[:, :before])[:, -1, :16].float().softmax(1)
            grid[:, y, x] = torch.multinomial(probabilities, 1, generator=random)[:, 0]
        assert torch.equal(prior.sample_window(2, 6, 9, condition, Sampling(), seeded(5)), grid)
        assert len(grid.unique()) > 3  # no constant, whatever network draws it
    for prior in (build(order="spiral"), build(scales=(2,))):
        with pytest.raises(ValueError, match="needs a model of one scale in the order row"):
            prior.sample_window(1, 8, 8)
    with pytest.raises(ValueError, match="4×4"):  # the training size, below which there is no window
        build().sample_window(1, 3, 8)


def test_a_prior_comes_back_from_its_state(tmp_path):
    for kind in ("none", "class", "depth"):
        prior = build(kind, "zcurve", (1,))
        prior.to("cpu").gpt.float()  # with convolutions in the memory format of a loaded one
        torch.save({"kind": "gpt"} | prior.state(), tmp_path / "checkpoint.pt")
        copy = Prior.load(tmp_path / "checkpoint.pt")
        assert not copy.gpt.training
        assert (copy.layout, copy.classes, copy.condition) == (prior.layout, prior.classes, prior.condition)
        drawn = [one.sample(2, conditions(prior, 2), generator=seeded(0)) for one in (prior, copy)]
        assert torch.equal(*drawn) and torch.equal(prior.pictures(drawn[0]), copy.pictures(drawn[1]))


def test_the_documented_script_runs_and_pictures_are_encoded_as_files_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prior = build().to("cpu")
    prior.gpt.float()
    torch.save({"kind": "gpt"} | prior.state(), "checkpoint.pt")
    script = stages.__doc__.split("From a script:")[1].split("Symbols")[0]
    exec(textwrap.dedent(script).replace("runs/gpt-demo-scenes-row/", ""), known := {})
    assert Image.open("edited.png").size == (4 * 96 + 3 * 2, 96) and known["codes"].shape == (4, 4, 4)
    pixels = (known["pictures"] * 127.5 + 127.5).round().clamp(0, 255).byte()
    for floats in (pixels / 127.5 - 1, pixels / 127.5 - pixels.new_ones(1, dtype=torch.float64)):
        assert torch.equal(prior.image.encode(pixels), prior.image.encode(floats))


def test_an_unconditional_file_of_the_authors_is_sampled_in_its_order_from_its_code_0(tmp_path, capsys):
    taming_files = pytest.importorskip("test_taming")
    for order in (None, "spiral", "subsample"):
        states, p = taming_files.both_stages(seed=1), torch.arange(16)
        if order:
            p = ORDERINGS[order](4, 4)
            states |= {"permuter.forward_shuffle_idx": p, "permuter.backward_shuffle_idx": p.argsort()}
        path = taming_files.write(tmp_path / "net2net.ckpt", states)
        prior, theirs = Prior.load(path, torch.device("cpu")), GPT.from_taming(path).eval()
        assert prior.layout == TokenLayout(20, 4, 4, order or "row") and list(prior.stages) == ["image"]
        tokens = torch.tensor([[0]])  # they start with code 0
        for _ in range(16):
            with torch.no_grad():
                tokens = torch.cat([tokens, theirs(tokens)[:, -1].argmax(1, keepdim=True)], 1)
        assert torch.equal(prior.sample(1, None, None, Sampling(top_k=1)), tokens[:, 1:])
    assert f"{path} is sampled as unconditional" in capsys.readouterr().out
    shuffled = torch.arange(16).flip(0)
    taming_files.write(path, states | {"permuter.forward_shuffle_idx": shuffled})
    with pytest.raises(ValueError, match="writes in an order that is none of row, spiral"):
        Prior.load(path, torch.device("cpu"))
    for name in ("transformer.tok_emb.weight", "transformer.head.weight"):
        states[name] = torch.cat([states[name], states[name][:4]])
    taming_files.write(path, states)
    with pytest.raises(ValueError, match="a GPT of 24 tokens for 20 codes; only unconditional models"):
        Prior.load(path, torch.device("cpu"))
