"""What a comparison shows while it works: a bar over all runs and one over the steps, and a line for each run."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from pegbox.evaluate.run_log import Finished, Run


class Progress:
    """Bars on a terminal; elsewhere the lines alone."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.bars = Bars(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.runs = self.bars.add_task("runs", total=None)
        self.step = self.bars.add_task("steps", total=None)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def start(self, runs: int, lines: list[str]) -> None:
        """Begin with so many runs to come."""
        for line in lines:
            self.say(line)
        self.bars.update(self.runs, total=runs)

    def steps(self, run: Run) -> TrainerCallback:
        """What tells the bar of a run's steps."""
        title = f"{run.method}, {run.stage} {run.rate:.2g}" + (f", {run.seed}" if run.stage == "seed" else "")
        return _Steps(self, title)

    def finished(self, done: Finished, metric: str, *, again: bool = False) -> None:
        """A line for a run; `again` for one of an earlier call."""
        run = done.run
        what = f"rate {run.rate:<8.2g}" + (f" seed {run.seed}" if run.stage == "seed" else "")
        took = "done before" if again else f"{done.seconds:.1f} s"
        self.say(f"{run.method:<12} {run.stage:<6} {what:<22} validation {metric} {done.valid:.4f}   {took}")
        self.bars.advance(self.runs)

    def show(self, what: Any) -> None:
        """Print a table or a text; into a file, as wide as it needs."""
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 130)
        self.console.print(what)


class _Steps(TrainerCallback):
    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bars = self.progress.bars
        bars.reset(self.progress.step, total=state.max_steps, description=self.title)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.bars.update(self.progress.step, completed=state.global_step)
