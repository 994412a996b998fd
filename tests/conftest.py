"""Settings for all tests. One thread: the tensors are small, and more threads wait for each other on a busy
machine. Without a GPU the kernels run in Triton's interpreter."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
