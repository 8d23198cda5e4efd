from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pegbox.core.errors import SettingsError
from pegbox.evaluate.run_log import Finished, Run, RunLog

RUN = Run("lora", "{}", "trial", 1e-3, 1)
DONE = Finished(RUN, 0.5, 10, 1.5, peak=100)


def test_runs_are_found_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {"steps": 3})
    log.add(DONE)
    log.add(Finished(replace(RUN, seed=2), math.nan, 10, 1.0))
    again = RunLog(tmp_path, {"steps": 3}).finished
    assert again[RUN] == DONE
    assert math.isnan(again[replace(RUN, seed=2)].valid)


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    log.add(DONE)
    with log.path.open("a") as file:
        file.write('{"run": {"method": "lo')
    again = RunLog(tmp_path, {})
    assert list(again.finished) == [RUN]
    again.add(Finished(replace(RUN, seed=3), 0.1, 1, 1.0))
    assert len(RunLog(tmp_path, {}).finished) == 2


def test_another_comparison_is_refused(tmp_path: Path) -> None:
    RunLog(tmp_path, {"max_steps": 3, "data": "a"})
    with pytest.raises(SettingsError, match="max_steps=3, not 4"):
        RunLog(tmp_path, {"max_steps": 4, "data": "a"})
