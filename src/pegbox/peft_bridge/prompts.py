"""PEFT's virtual tokens and prefixes: its encoders make them, Pegbox puts them where they go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pegbox.core import (
    Anatomy,
    Graft,
    Pairs,
    Site,
    Survey,
    VirtualTokens,
    key_shape,
    prefix_graft,
    survey,
    token_graft,
    token_sites,
)
from pegbox.core.adapter import Adapter, check_fit
from pegbox.core.context import Context
from pegbox.core.prefix import Place
from pegbox.peft_bridge.harvest import quiet, refusal
from pegbox.peft_bridge.method import PeftMethod, State, plain_config

MADE = "prompt_embeddings"  # PEFT's key for what an encoder has made
TASKS = ("prefix_task_cols", "prefix_task_rows")


class Encoded(VirtualTokens):
    """Virtual tokens that an encoder of PEFT's makes."""

    def __init__(self, model: nn.Module, encoder: nn.Module, config: Any) -> None:
        super().__init__(model, config.num_virtual_tokens)
        self.encoder, self.config = encoder, config
        self.of_tasks = any(name in TASKS for name, _ in encoder.named_parameters())
        self.context: tuple[Context, ...] = ()  # of the tuned model, once there is one

    def embed(self, embedded: Tensor) -> Tensor:
        """(n, d), or (B, n, d) where tasks differ; a row is of task 0 if `task_ids` are not given."""
        indices = torch.arange(self.count, device=embedded.device)[None]  # (1, n)
        if not self.of_tasks:
            made: Tensor = self.encoder(indices)[0]
            return made
        tasks = self.context[0].read("task_ids", indices.new_zeros(len(embedded)), like=indices)
        of_rows: Tensor = self.encoder(indices.expand(len(tasks), -1), tasks)
        return of_rows

    def table(self) -> Tensor:
        """(n, d), what PEFT's file holds: the encoder's outputs, or its table where tasks differ."""
        if self.of_tasks:
            kept: Tensor = self.encoder.embedding.weight  # type: ignore[union-attr, assignment]
            return kept
        device = next(self.encoder.parameters()).device
        made: Tensor = self.encoder(torch.arange(self.count, device=device)[None])[0]
        return made


class PromptMethod(PeftMethod):
    """Base of those whose encoder makes virtual tokens before the input."""

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return token_sites(model, super().sites(model, anatomy)[0])

    def shared(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        table: Any = model.get_submodule(self.sites(model, anatomy)[-1])
        config = self.prompt_config(model, token_dim=table.weight.shape[1], num_layers=len(anatomy.blocks))
        return Encoded(model, self.encoder(config, table), config)

    def prompt_config(self, model: nn.Module, **read: Any) -> Any:
        """PEFT's configuration, with what it reads off the model."""
        heads = getattr(getattr(model, "config", None), "num_attention_heads", 1)
        values = {"num_transformer_submodules": 1, "num_attention_heads": heads} | read
        return self._configured(self.given() | values)

    def encoder(self, config: Any, table: nn.Module) -> nn.Module:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        with quiet():
            made: nn.Module = cls(config, table) if self.tuner.endswith("prompt_tuning") else cls(config)
        return made.float().to(next(table.parameters()).device)

    def graft(self, site: Site, shared: nn.Module | None) -> Graft | None:
        assert isinstance(shared, Encoded)
        shared.context = (site.context,)
        return token_graft(site, shared)

    # -- files -----------------------------------------------------------------------------------------------------

    def to_file(self, model: nn.Module, adapter: Adapter, state: State) -> State:
        """What the encoder has made, by PEFT's key; and the encoder, where it made that of something else."""
        tasks = {name: state[f"shared.encoder.{name}"].clone() for name in TASKS if f"shared.encoder.{name}" in state}
        own = {} if _is_table(state, adapter) else dict(state)
        return own | {MADE: _table(adapter)} | tasks

    def from_file(self, model: nn.Module, adapter: Adapter, tensors: State) -> State:
        want = {key: value.detach() for key, value in adapter.own_state().items() if not key.startswith("copy.")}
        if not _is_table(want, adapter):
            check_fit(tensors, want | {MADE: _table(adapter)}, "the adapter")
            return {key: tensors[key] for key in want}
        tasks = {key: key.rpartition(".")[2] for key in want if key.endswith(TASKS)}
        rows = {key: len(value) for key, value in want.items() if key not in tasks}
        check_fit(tensors, {MADE: _table(adapter)} | {name: want[key] for key, name in tasks.items()}, "the adapter")
        parts = zip(rows, tensors[MADE].split(list(rows.values())), strict=True)
        return dict(parts) | {key: tensors[name] for key, name in tasks.items()}

    def file_config(self, adapter: Adapter) -> dict[str, Any]:
        return plain_config(_shared(adapter).config)


class EncodedPairs(Pairs):
    """Keys and values before every layer's own, which an encoder of PEFT's makes."""

    def __init__(self, found: Survey, encoder: nn.Module, config: Any) -> None:
        super().__init__(found, config.num_virtual_tokens)
        self.encoder, self.config = encoder, config

    def of(self, place: Place) -> Tensor:
        return self.table().unflatten(1, (len(self.survey.places), 2, -1))[:, place.index]

    def table(self) -> Tensor:
        """(n, 2 L width)"""
        device = next(self.encoder.parameters()).device
        made: Tensor = self.encoder(torch.arange(self.count, device=device)[None])[0]
        return made


class PrefixMethod(PromptMethod):
    """Base of those whose encoder makes keys and values before every layer's own."""

    def sites(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        return self._survey(model, anatomy).paths

    def _survey(self, model: nn.Module, anatomy: Anatomy) -> Survey:
        return survey(model, anatomy, PeftMethod.sites(self, model, anatomy))

    def shared(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        PeftMethod.sites(self, model, anatomy)  # a model without attention is refused for that
        self._check_config(model)
        found = self._survey(model, anatomy)
        heads, width = key_shape(getattr(model, "config", None))
        config = self.prompt_config(
            model, token_dim=heads * width, num_layers=len(found.places), num_attention_heads=heads
        )
        table = next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
        return EncodedPairs(found, self.encoder(config, table), config)

    def _check_config(self, model: nn.Module) -> None:
        """PEFT makes all of a prefix in one size, which it reads off the model's config, or refuses."""
        from peft.tuners.tuners_utils import BaseTuner
        from peft.utils.other import _prepare_prompt_learning_config

        try:
            _prepare_prompt_learning_config(self._configured(self.given()), BaseTuner.get_model_config(model))
        except ValueError as error:
            raise refusal(error, self.name()) from error

    def graft(self, site: Site, shared: nn.Module | None) -> Graft:
        assert isinstance(shared, EncodedPairs)
        return prefix_graft(site, shared)


def _is_table(state: State, adapter: Adapter) -> bool:
    """Whether the encoder is no more than the table of what it makes, in one piece or in several."""
    rows = [len(value) for key, value in state.items() if not key.endswith(TASKS)]
    return sum(rows) == _shared(adapter).count


def _shared(adapter: Adapter) -> Encoded | EncodedPairs:
    assert isinstance(adapter.shared, (Encoded, EncodedPairs))
    return adapter.shared


@torch.no_grad()
def _table(adapter: Adapter) -> Tensor:
    shared = _shared(adapter)
    was = shared.training
    shared.eval()
    try:
        return shared.table().detach().clone()
    finally:
        shared.train(was)
