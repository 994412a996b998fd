"""Settings and fixtures for all tests.

One thread: the tensors are small, and more threads wait for each other on a busy machine. Without a GPU the
kernels run in Triton's interpreter, and the whole suite on all cores.
"""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else who asks for a GPU cannot fork any more

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from all_cores import pytest_runtestloop  # noqa: F401


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """16 training and 4 validation pictures of 16×16: a bright square on a dark ground."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = np.full((16, 16, 3), 40, np.uint8)
            y, x = random.integers(0, 8, 2)
            pixels[y:y + 8, x:x + 8] = random.integers(100, 255, 3)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def first_stage(pictures, tmp_path_factory) -> Path:
    """A checkpoint of train_vq.py after 12 steps."""
    import train_vq
    from helpers import vq_flags
    return train_vq.main([*vq_flags(pictures, tmp_path_factory.mktemp("vq")), "--steps", "12"])


@pytest.fixture(scope="session")
def second_stage(pictures, first_stage, tmp_path_factory) -> Path:
    """A checkpoint of train_gpt.py after 4 steps, in the order spiral."""
    import train_gpt
    from helpers import gpt_flags
    flags = gpt_flags(pictures, first_stage, tmp_path_factory.mktemp("gpt"))
    return train_gpt.main([*flags, "--order", "spiral", "--steps", "4"])
