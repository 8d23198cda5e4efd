"""What a run shows and writes as it goes: a bar on a terminal, lines elsewhere, and `metrics.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

METRICS = "metrics.jsonl"
SHOWN = ("loss", "learning_rate", "grad_norm", "epoch")


class Progress(TrainerCallback):
    """A bar with the last loss, and a line for each evaluation; off a terminal, a line for each line of the log."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.terminal = sys.stderr.isatty()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.terminal:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="steps", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or "train_runtime" in logs:
            return
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}")
            return
        print_line(self.bar, f"step {state.global_step}/{state.max_steps}  {spell(logs)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def print_line(bar: tqdm[Any] | None, line: str) -> None:
    if bar is None:
        print(line, flush=True)
    else:
        bar.write(line)


def spell(logs: dict[str, Any]) -> str:
    """`loss 2.31  learning_rate 0.0002`; timings are left out."""
    timings = ("_runtime", "_per_second", "_preparation_time")
    shown = {k: v for k, v in logs.items() if isinstance(v, float | int) and not k.endswith(timings)}
    return "  ".join(f"{key} {value:.4g}" for key, value in shown.items())


class MetricsFile(TrainerCallback):
    """Every line of the log as a line of `metrics.jsonl`, on disk at once; a resumed run goes on where it resumed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [line for line in self._lines() if json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept) if state.global_step else "")

    def _lines(self) -> list[str]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        return [line for line in lines if line.endswith("}\n")]  # the last one may be cut

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
