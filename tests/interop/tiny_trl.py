"""Tuned models and data for trainers that know nothing of Pegbox."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

import pegbox
from pegbox.core import Tuned
from train import tiny

# by weight, by output, by selection (a difference of the biases; the base itself)
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 4}, "series": {"bottleneck": 4}, "bitfit": {}, "full": {}}
KEEP_THE_BASE = tuple(name for name in METHODS if name != "full")
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def base() -> LlamaForCausalLM:
    return tiny.llama(attention_bias=True)


def tune(method: str) -> Tuned:
    return pegbox.tune(base(), method, **METHODS[method])


def snapshot(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors}


def assert_only_the_adapter_changed(tuned: Tuned, before: dict[str, torch.Tensor]) -> None:
    """Every tensor that trains has moved, and every other one of the base is as it was made, bit for bit."""
    after = {name: value.detach() for name, value in tuned.trainable().items()}
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert not torch.equal(value, before[name]), name
    fresh = dict(base().named_parameters())
    for name, value in tuned.model.named_parameters():
        if f"base.{name}" not in after:
            assert torch.equal(value, fresh[name]), name


def assert_saved(tuned: Tuned, folder: Any) -> None:
    """The folder holds the adapter as it is now, and loads on a fresh base."""
    again = pegbox.load(base(), folder)
    ours, theirs = tuned.state(), again.state()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=0)
