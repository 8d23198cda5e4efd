"""FSDP2: sharding over processes without a GPU, and whole tensors out of sharded ones.

Accelerate turns FSDP on for GPUs and other accelerators only; on several CPU processes it drops the request and runs
DDP (accelerate 1.15, `AcceleratorState.__init__`, where MULTI_CPU is not among the kinds that may become FSDP).  The
rest of its FSDP2 path is indifferent to the device, and torch's `fully_shard` runs over gloo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import TrainingArguments


def shard_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Make accelerate shard where it has fallen back to DDP."""
    if accelerator.state.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)


def reshard(model: nn.Module) -> None:
    """Spread the parameters again that a forward without a backward has left whole; checkpoints know the parts."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
