"""A classifier over the mean of an encoder's last hidden states, for encoders that were trained with that pooling.

    logits = W mean_t h_t + b        over the tokens t that are not padding        h: (B, T, D)   W: (C, D)

Sentence encoders such as all-MiniLM-L6-v2 were trained so; their `1_Pooling/config.json` says it.  The classifier that
transformers builds on the same files reads the first token through a layer that this training never touched.

This is a transformers model with a configuration of its own, so it saves, loads and merges as any other.  The file
imports torch and transformers alone because it travels with saved models: where Pegbox is not installed they load with
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers
DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")  # the first that a config has
QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class MeanPooledConfig(PreTrainedConfig):
    """The configuration of the encoder, whose attributes show through, and of the classifier on it."""

    model_type = "mean_pooled_encoder"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  (transformers' own form)
    has_no_defaults_at_init = True

    def __init__(self, encoder: PreTrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder: Any = encoder
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        encoder = self.__dict__.get("encoder")
        if encoder is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(encoder, name)


class MeanPooledForSequenceClassification(PreTrainedModel):
    """An encoder, the mean over its tokens, dropout, and a linear classifier."""

    config_class = MeanPooledConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = AutoModel.from_config(config.encoder, **_no_pooler(config.encoder))
        width: int = config.encoder.hidden_size
        known = (getattr(config, name, None) for name in DROPOUTS)
        self.dropout = nn.Dropout(next((share for share in known if share is not None), 0.0))
        self.classifier = nn.Linear(width, config.num_labels or 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask: (B, T); labels: (B,) classes, or (B, C) of 0 and 1.  logits: (B, C)"""
        kwargs.pop("return_dict", None)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]  # (B, T, D)
        logits = self.classifier(self.dropout(mean_pooled(hidden, attention_mask)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()


def mean_pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D), (B, T) -> (B, D)"""
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _no_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """The argument that leaves out the first-token layer, where the encoder has one."""
    encoder: Any = AutoModel._model_mapping[type(config)]
    parameters = inspect.signature(encoder).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def pools_by_mean(name: str | Path) -> bool:
    """Whether the files of an encoder say that it was trained with the mean over its tokens, and nothing else."""
    from transformers.utils.hub import cached_file

    found = cached_file(str(name), POOLING_FILE, **QUIETLY)
    if found is None:
        return False
    said = json.loads(Path(found).read_text())
    modes = [key for key, value in said.items() if key.startswith("pooling_mode_") and value]
    return modes == ["pooling_mode_mean_tokens"] or said.get("pooling_mode") == "mean"


def on_encoder(
    name: str | Path, *, dtype: str | torch.dtype = "auto", quantization_config: Any = None, **config: Any
) -> PreTrainedModel:
    """A new classifier on an encoder's files.

    Args:
        quantization_config: of the encoder.
        config: of the classifier: `num_labels`, `id2label`, `label2id`, `classifier_dropout`.
    """
    own = AutoConfig.from_pretrained(name)
    few_bits = {} if quantization_config is None else {"quantization_config": quantization_config}
    encoder = AutoModel.from_pretrained(name, dtype=dtype, **_no_pooler(own), **few_bits)
    encoder.config.name_or_path = ""  # saved models name no folder of the machine that made them
    made = MeanPooledConfig(encoder=encoder.config, name_or_path=str(name), **config)
    model = MeanPooledForSequenceClassification(made).to(encoder.dtype)
    model.encoder = encoder
    return model.eval()


def load_classifier(name: str | Path, **settings: Any) -> PreTrainedModel:
    """A sequence classifier by name or folder, with the pooling that its encoder was trained with.

    Args:
        settings: of `from_pretrained`: `dtype`, `num_labels`, `id2label`, `label2id`.
    """
    if not pools_by_mean(name):
        return AutoModelForSequenceClassification.from_pretrained(name, **settings)
    settings.pop("ignore_mismatched_sizes", None)
    return on_encoder(name, **settings)


# So that transformers loads what was saved: here by the classes above, elsewhere by a copy of this file beside it.
AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledForSequenceClassification, exist_ok=True)
MeanPooledConfig.register_for_auto_class()
MeanPooledForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
