"""Settings for all tests: one thread. The tensors are small, and more threads wait for each other on a busy machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
