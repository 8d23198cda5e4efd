"""`transformers.Trainer` for tuned models: its loop, launchers, precision and trackers, with few overrides."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from pegbox import methods, objectives
from pegbox.core import Tuned, files
from pegbox.core.errors import AdapterError, CannotMix, SettingsError, did_you_mean
from pegbox.core.headless import unwrap
from pegbox.core.settings import build
from pegbox.objectives.batch import READ_HERE
from pegbox.objectives.objective import Batch, Losses, Objective
from pegbox.train import checkpoint as checkpoints
from pegbox.train.callback import Callback, places, save_adapters
from pegbox.train.evaluation import Measure, evaluate
from pegbox.train.identity import identity
from pegbox.train.quantised import allow_quantised
from pegbox.train.sampler import SimilarLengths
from pegbox.train.sharding import shard_on_cpu
from pegbox.train.training_state import load_training_state, save_training_state
from pegbox.train.turns import takes_turns

Loss = Callable[..., Losses]


class Trainer(transformers.Trainer):
    """Trains a tuned model on an objective.

        trainer = pegbox.Trainer(tuned, "sft", TrainingArguments("out"), train_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint="auto")

    The loss is the sum of the objective's terms, exact over accumulated and distributed batches of unequal sizes, and
    of the method's own.  Parameters train with their groups' learning rates (`tuned.groups`), by the method's own
    optimizer where it has one.  Checkpoints hold the adapter, not the base, are whole or not there, and resume to the
    same bits.

    Args:
        tuned: with the adapters to train in use.
        objective: a name of `pegbox.objectives`, an `Objective`, or a function (model, batch) to named losses, each a
            mean over the batch.
        args: as for `transformers.Trainer`.
        data_collator: makes a batch of rows, as those of `pegbox.data.collate`.
        metrics: predictions of the evaluation set to numbers, beside those of the objective.
        objective_options: its settings, `{"beta": 0.1}`, and `reference`, a model that it compares with where that is
            not the tuned model with its adapter off; passed to an objective that has no settings.
        extra: plain values kept with the adapter, `{"labels": [...]}`.
        facts: what else a resumed run must have in common with this one, `{"data": hash}`.
        kwargs: of `transformers.Trainer`.

    Raises:
        SettingsError: an unknown objective, or one that lacks an option.
        MethodError: a quantised base whose own tensors the method trains.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        tuned: Tuned,
        objective: str | Objective | Loss = "sft",
        args: TrainingArguments | None = None,
        *,
        metrics: Measure | None = None,
        objective_options: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self._acts = Callback(tuned, save=False)
        self.tuned, self.metrics = tuned, metrics
        self.methods = {name: tuned.adapter(name).method for name in tuned.active}  # as they are before they find ranks
        args = args or TrainingArguments("trainer_output")
        self.objective: Objective | Loss
        self.objective, self.objective_options = _given(objective, dict(objective_options or {}) | _smoothing(args))
        allow_quantised(tuned)
        self.extra, self.facts = dict(extra or {}), dict(facts or {})
        self._terms: dict[str, Tensor] = {}  # sums of the named losses since the last line of the log
        self._logged_at = 0
        self._staging: Path | None = None
        self._wanted_cache = getattr(tuned.config, "use_cache", None) if hasattr(tuned, "config") else None
        if args.ddp_find_unused_parameters is None and not takes_turns(tuned):
            args.ddp_find_unused_parameters = not args.gradient_checkpointing
        if args.n_gpu > 1:
            args._n_gpu = 1  # nn.DataParallel copies modules, which grafts do not follow
        others = [c for c in callbacks if not isinstance(c, Callback)]
        super().__init__(tuned, args, callbacks=[self._acts, _Progress(self), *others], **kwargs)
        self.model_accepts_loss_kwargs = True
        self._signature_columns: Any = [
            *inspect.signature(type(unwrap(tuned)).forward).parameters,
            *READ_HERE,
        ]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = self.accelerator.state.fsdp_plugin is not None

    # -- the step ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = self.tuned.groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = self._own_optimizer(groups)
        if self.optimizer is None:
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.tuned)  # type: ignore[arg-type]
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def _own_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        made = [m.optimizer(groups) for m in self._acts.methods]
        own = [optimizer for optimizer in made if optimizer is not None]
        if own and len(made) > 1:
            raise CannotMix("a method with an optimizer of its own trains alone; use one adapter")
        return own[0] if own else None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The batches of one optimizer step, and what their loss is a mean over, in all processes."""
        if self.finished():
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches or not isinstance(self.objective, Objective):
            return batches, None
        counts = [self.objective.count(batch, **self.objective_options) for batch in batches]
        items = self.accelerator.reduce(torch.stack(counts).sum(0).to(device), "sum")
        return batches, torch.where(items == 0, torch.ones_like(items), items)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One forward and backward; what adapters read from the context is there for both, as recomputation wants."""
        words = {word for method in self._acts.methods for word in method.reads}
        with self.tuned.given(**{word: inputs[word] for word in words & inputs.keys()}):
            rest = {word: value for word, value in inputs.items() if word not in words}
            return super().training_step(model, rest, num_items_in_batch)

    def finished(self) -> bool:
        """Whether all steps are done, which transformers' loop does not ask before the first one of a resumed run."""
        if self.state.global_step < self.state.max_steps:
            return False
        self.control.should_training_stop = True
        return True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, scaled so that those of a step add up to the loss of the step."""
        batches = self.current_gradient_accumulation_steps
        if isinstance(self.objective, Objective) and num_items_in_batch is not None:
            terms = self.objective(model, inputs, num_items=num_items_in_batch, **self.objective_options)
            terms = {name: term * self.accelerator.num_processes for name, term in terms.items()}
        else:
            terms = self.objective(model, inputs, **self.objective_options)
            terms = {name: term / batches for name, term in terms.items()}
        terms |= {name: term / batches for name, term in self.tuned.extra_losses().items()}
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach()
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each named loss beside their sum, where there are several."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_at)
            if len(self._terms) > 1:
                means = {name: self.accelerator.reduce(term, "mean") / steps for name, term in self._terms.items()}
                logs |= {f"loss_{name}": float(mean) for name, mean in means.items()}
            self._terms, self._logged_at = {}, self.state.global_step
        super().log(logs, start_time)

    # -- training and evaluation -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `transformers.Trainer.train`; `"auto"` or True goes on from the last complete checkpoint, if any.

        Raises:
            SettingsError: an incomplete checkpoint, or one of a run with other settings or data.
        """
        found = self._found(resume_from_checkpoint)
        if found is not None:
            self._check_same(found)
        elif self._acts.needs_data:
            self._acts.calibrate(_Batches(self), self._plain_loss)
        self._terms, self._logged_at = {}, 0
        try:
            return super().train(resume_from_checkpoint=None if found is None else str(found), **kwargs)
        finally:
            self._acts.close()
            if self._wanted_cache is not None:
                self.tuned.config.use_cache = self._wanted_cache

    def _plain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of one batch by itself, before training."""
        count = self.objective.count(batch, **self.objective_options) if isinstance(self.objective, Objective) else None
        self.current_gradient_accumulation_steps = 1
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, batch, num_items_in_batch=count)
        return loss

    def _found(self, wanted: str | bool | None) -> Path | None:
        if wanted in (None, False):
            return None
        if wanted in (True, "auto"):
            return checkpoints.last_complete(Path(str(self.args.output_dir)))
        return Path(str(wanted))

    def _check_same(self, folder: Path) -> None:
        made = checkpoints.read_seal(folder)["identity"]
        differs = checkpoints.difference(made, self.identity())
        if differs:
            raise SettingsError(
                f"{folder} was made by another run: {differs}; give the settings it was made with, or another output"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the bits of this run; a checkpoint is resumed only by a run that has the same."""
        return identity(self) | self.facts

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See `pegbox.train.evaluation`."""
        self.callback_handler.eval_dataloader = dataloader
        return evaluate(self, dataloader, metric_key_prefix)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = str(self.args.metric_for_best_model).removeprefix("eval_")
        timings = ("_runtime", "_per_second")
        known = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not key.endswith(timings)]
        if self.args.metric_for_best_model is not None and wanted not in known:
            raise SettingsError(f"best names no metric {wanted!r} of this objective{did_you_mean(wanted, known)}")
        return super()._determine_best_metric(metrics, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Sequence):
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SimilarLengths([len(row) for row in rows], size, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        rows_have_keys = not isinstance(eval_dataset, list)  # what transformers needs to sort by length
        return super()._get_eval_sampler(eval_dataset) if rows_have_keys else SequentialSampler(eval_dataset)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapters in use; the base is not written."""
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save or self.is_fsdp_enabled:
            save_adapters(self.tuned, folder, writes=self.args.should_save, **self.extra)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of a sharded model transformers would write the base as well."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Into another folder first; renamed when complete."""
        output, name = Path(self._get_output_dir(trial)), f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.args.should_save:
            self._staging = checkpoints.staging(output)
        self._staging = output / checkpoints.UNFINISHED
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.args.save_total_limit = None, limit
        self.accelerator.wait_for_everyone()
        written = output / checkpoints.UNFINISHED / name
        save_training_state(self.tuned, written, writes=self.args.should_save)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(output / f"{checkpoints.PREFIX}{self.state.best_global_step}")
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            checkpoints.seal(written, output, {"identity": self.identity(), "progress": self._progress()})
            os.rmdir(output / checkpoints.UNFINISHED)
            checkpoints.rotate(output, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _progress(self) -> dict[str, Any]:
        """What has been summed up since the last line of the log; a float's digits are exact."""
        terms = {name: float(term) for name, term in self._terms.items()}
        return {"loss": self._tr_loss.item(), "terms": terms, "logged_at": self._globalstep_last_logged}

    def _restore_progress(self, folder: Path) -> None:
        progress = checkpoints.read_seal(folder)["progress"]
        device = self.args.device
        self._tr_loss = torch.tensor(progress["loss"], device=device)
        self._total_loss_scalar = -progress["loss"]  # the mean over this call's steps leaves out earlier ones
        self._terms = {name: torch.tensor(value, device=device) for name, value in progress["terms"].items()}
        self._globalstep_last_logged = self._logged_at = progress["logged_at"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed = Path(resume_from_checkpoint)
        self._load_adapters(self._resumed)

    def _load_best_model(self) -> None:
        self._load_adapters(Path(str(self.state.best_model_checkpoint)))

    def _load_adapters(self, folder: Path) -> None:
        for name, place in places(self.tuned, folder).items():
            file = methods.read(place)
            mine = self.tuned.adapter(name).method
            if file.method != mine.name():
                raise AdapterError(f"{place} holds a {file.method} adapter, this run trains {mine.name()}")
            if any(file.settings.get(key) != getattr(mine, key) for key in mine.found):
                self.tuned.remake(name, build(type(mine), file.settings, what=mine.name()))
            files.fill(file, self.tuned, name)
        load_training_state(self.tuned, folder)

    _resumed: Path | None = None


class _Batches:
    """The training batches, from the beginning each time they are gone through."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Batch]:
        return map(self.trainer._prepare_inputs, self.trainer.get_train_dataloader())


class _Progress(TrainerCallback):
    """Takes up the sums of the interrupted run once the loop has set them to zero."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._resumed is not None:
            self.trainer._restore_progress(self.trainer._resumed)
            self.trainer._resumed = None


def _given(objective: str | Objective | Loss, options: dict[str, Any]) -> tuple[Objective | Loss, dict[str, Any]]:
    """The objective with its settings, and what is still to be passed to it."""
    found = objectives.get(objective) if isinstance(objective, str) else objective
    if not isinstance(found, Objective) or (found.settings is None and "reference" not in options):
        return found, options
    reference = options.pop("reference", None)
    return found.given(options, reference=reference), {}


def _smoothing(args: TrainingArguments) -> dict[str, float]:
    return {"label_smoothing": args.label_smoothing_factor} if args.label_smoothing_factor else {}
