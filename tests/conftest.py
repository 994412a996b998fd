"""Settings for all tests: two threads, because bit-for-bit claims hold for a fixed number of them."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported; subprocesses inherit it
