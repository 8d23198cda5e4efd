"""What an objective is: its loss, what its loss is a mean over, and what to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from pegbox.core.errors import SettingsError
from pegbox.core.settings import build

Batch = Mapping[str, Any]
Losses = dict[str, Tensor]
Predictions = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an objective can be told, `objective.beta=0.1`; a subclass names its fields with `setting`."""

    def check(self) -> None:
        """Raise SettingsError where two settings contradict each other."""


@dataclass(frozen=True)
class Objective:
    """An objective; called, it is its loss.

    Attributes:
        name: as in `pegbox.objectives.NAMES`
        loss: (model, batch, **options) -> named losses; their sum is the loss, a mean unless `num_items` is given
        count: (batch, **options) -> what the mean divides by.  The sum over all batches of an optimizer step, given
            as `num_items`, makes accumulated gradients those of the whole.
        predict: (model, batch) -> tensors with one row an example (or token), without gradient; concatenate them
            over batches and give them to `measure`
        measure: predictions -> named numbers
        best: the number that decides which model is better
        higher_is_better: whether more of it is better
        settings: what it can be told, the defaults of `options`; loss, count, predict and measure take `settings=`
        refers: it compares with a reference model; loss and predict take `reference=`
        options: the settings in force
    """

    name: str
    loss: Callable[..., Losses]
    count: Callable[..., Tensor]
    predict: Callable[..., Predictions]
    measure: Callable[..., dict[str, float]]
    best: str
    higher_is_better: bool
    settings: type[Settings] | None = None
    refers: bool = False
    options: Settings | None = None

    def given(self, values: Mapping[str, Any], *, reference: nn.Module | None = None) -> Objective:
        """This objective with settings: `get("dpo").given({"beta": 0.2})`.

        Args:
            values: settings by name; those not given stay as they are, by default as declared.
            reference: the model that it compares with, where that is not the tuned model with its adapter off.

        Raises:
            SettingsError: a setting that it does not have, a wrong value, or a reference where it has no use for one.
        """
        if reference is not None and not self.refers:
            raise SettingsError(f"objective {self.name} compares with no reference model; leave it out")
        if self.settings is None:
            if values:
                raise SettingsError(f"objective {self.name} has no settings of its own, got {next(iter(values))!r}")
            return self
        before = {} if self.options is None else asdict(self.options)
        chosen = build(self.settings, before | dict(values), what=f"objective {self.name}")
        chosen.check()
        models = {} if reference is None else {"reference": reference}
        return replace(
            self,
            loss=partial(self.loss, settings=chosen, **models),
            count=partial(self.count, settings=chosen),
            predict=partial(self.predict, settings=chosen, **models),
            measure=partial(self.measure, settings=chosen),
            options=chosen,
        )

    def __call__(self, model: nn.Module, batch: Batch, **options: Any) -> Losses:
        return self.loss(model, batch, **options)
