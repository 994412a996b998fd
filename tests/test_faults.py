"""The short form of results/faults/storm.py. Oracle: the run that nobody killed, bit for bit."""
from helpers import ROOT


def test_kills_at_random_moments_leave_whole_files_and_the_weights_of_a_run_that_was_not_killed(
        tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results" / "faults"))
    import storm
    interrupted, ended, wrong = storm.storm(tmp_path, kills=3)
    assert (interrupted.total(), set(ended), wrong) == (3, {0}, [])
