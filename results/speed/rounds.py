"""Timing of functions that take turns, so that all share whatever else the machine does."""
import time
from collections.abc import Callable


def alternate(forms: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each form in each round, without the first `warm_up` rounds."""
    times = {name: [] for name in forms}
    for _ in range(warm_up + rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - began)
    return {name: each[warm_up:] for name, each in times.items()}
