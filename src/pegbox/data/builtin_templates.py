"""Small chat templates for tokenizers that come without one.

`message.role` is one of system, user, assistant; a template that has no place for a role raises.  An assistant's turn
ends with the tokenizer's EOS, except where the family has an end-of-turn token of its own (chatml, gemma).
"""

from __future__ import annotations

from collections.abc import Mapping

BUILT_IN: Mapping[str, str] = {
    "alpaca": """\
{{- bos_token or '' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}{{- '### Instruction:\n' + message.content + '\n\n' }}
    {%- elif message.role == 'assistant' %}{{- '### Response:\n' + message.content + eos_token + '\n\n' }}
    {%- else %}{{- raise_exception('alpaca has no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}""",
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "gemma": """\
{{- bos_token or '' }}
{%- set lead = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if lead else messages) %}
    {%- if message.role not in ('user', 'assistant') %}{{- raise_exception('gemma has no role ' + message.role) }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
    {{- (lead if loop.first else '') + message.content + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}""",
    "llama2": """\
{%- set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' %}
{%- for message in (messages[1:] if lead else messages) %}
    {%- if message.role == 'user' %}
        {{- (bos_token or '') + '[INST] ' + (lead if loop.first else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + ' ' + eos_token }}
    {%- else %}{{- raise_exception('llama2 has no role ' + message.role + ' here') }}
    {%- endif %}
{%- endfor %}""",
    "plain": """\
{{- bos_token or '' }}
{%- for message in messages %}
    {{- message.role | capitalize + ': ' + message.content }}
    {{- (eos_token if message.role == 'assistant' else '') + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}""",
}
