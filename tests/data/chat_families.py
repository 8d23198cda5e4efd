"""Chat templates of the shapes that model families use, in short, and what each trains of a known conversation."""

from __future__ import annotations

from dataclasses import dataclass

CONTROL = tuple(
    line.strip()
    for line in [
        "<unk>",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ]
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and the text trained of `user Hi / assistant Yo! / user And? / assistant So.`"""

    template: str
    trains: tuple[str, str]
    eos: str
    bos: str | None = None


QWEN = """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<response>\\n' + m.content + '\\n</response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set said = m.content %}{% set why = '' %}
{%- if m.role == 'assistant' and '</think>' in said %}
{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or why) %}
{{- '<think>\\n' + why + '\\n</think>\\n\\n' }}{% endif %}
{{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA3_ALWAYS_PROMPTS = LLAMA3.replace("if add_generation_prompt", "if true")

LLAMA2 = """{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}
{%- else %}{% set rest = messages %}{% set sys = false %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- if loop.first and sys %}{% set said = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m.content %}
{%- else %}{% set said = m.content %}{% endif %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + said | trim + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + said | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

MISTRAL = """{{- bos_token }}
{%- set plain = messages | rejectattr('role', 'equalto', 'tool') | selectattr('tool_calls', 'undefined') | list %}
{%- for m in plain if m.role != 'system' %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST]' }}
{%- if loop.last and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS]' + (m.tool_calls | tojson) + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

ZEPHYR = """{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>\\n' + m.content + eos_token }}
{% elif m.role == 'system' %}
{{ '<|system|>\\n' + m.content + eos_token }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>\\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

DEEPSEEK = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{% set said = m.content %}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

ALPACA = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content + '\\n\\n' }}
{%- elif m.role == 'user' %}{{- '### Instruction:\\n' + m.content + '\\n\\n' }}
{%- else %}{{- '### Response:\\n' + m.content + '\\n\\n' }}{% if loop.last %}{{- eos_token }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}"""

VICUNA = """{{- 'A chat. ' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{- 'ASSISTANT: ' + m.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT: ' }}{% endif %}"""

FAMILIES = {
    "qwen": Family(QWEN, ("Yo!<|im_end|>", "So.<|im_end|>"), "<|im_end|>"),
    "qwen3": Family(QWEN3, ("Yo!<|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"), "<|im_end|>"),
    "llama3": Family(LLAMA3, ("Yo!<|eot_id|>", "So.<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>"),
    "llama3-always-prompts": Family(
        LLAMA3_ALWAYS_PROMPTS, ("Yo!<|eot_id|>", "So.<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>"
    ),
    "llama2": Family(LLAMA2, (" Yo! </s>", " So. </s>"), "</s>", "<s>"),
    "mistral": Family(MISTRAL, (" Yo!</s>", " So.</s>"), "</s>", "<s>"),
    "gemma": Family(GEMMA, ("Yo!<end_of_turn>", "So.<end_of_turn>"), "<eos>", "<bos>"),
    "zephyr": Family(ZEPHYR, ("Yo!</s>", "So.</s>"), "</s>", "<s>"),
    "phi3": Family(PHI3, ("Yo!<|end|>", "So.<|end|>\n<|endoftext|>"), "<|endoftext|>"),
    "deepseek": Family(
        DEEPSEEK,
        ("Yo!<｜end▁of▁sentence｜>", "So.<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    "alpaca": Family(ALPACA, ("Yo!\n\n", "So.\n\n</s>"), "</s>", "<s>"),
    "vicuna": Family(VICUNA, ("Yo!</s>", "So.</s>"), "</s>", "<s>"),
}
