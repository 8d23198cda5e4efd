"""Settings with which every tuner of PEFT's fits tiny models; what is not said here is made small by the suite."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 6},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 1},
    "boft": {"boft_block_size": 4},
    "cartridge": {"num_virtual_tokens": 3},
    "fourierft": {"n_frequency": 20},
    "lora": {"r": 4, "lora_alpha": 6},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3, "num_tasks": 2},
    "oft": {"oft_block_size": 4},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "trainable_tokens": {"token_indices": tuple(range(2, 40))},
    "unilora": {"theta_d_length": 4000},
    "vblora": {"vector_length": 4, "num_vectors": 8},
}
