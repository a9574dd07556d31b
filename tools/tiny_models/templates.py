"""Chat templates: how a conversation becomes a prompt."""

from __future__ import annotations

LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
{{- '<|system|>\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- 'You can call these functions:' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '\\n' -}}
{{- {'name': function.name, 'description': function.description,
     'parameters': function.parameters} | tojson -}}
{%- endfor -%}
{{- '\\nTo call one, answer with its name and parameters as JSON.<|end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == 'system') -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '; ' if not loop.first -}}
{{- '{"name": "' + function.name + '", "parameters": ' -}}
{%- if function.arguments is string -%}{{- function.arguments -}}
{%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
{{- '}' -}}
{%- endfor -%}
{{- '<|end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- if thinking or enable_thinking -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
"""
QWEN_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- 'You can call these functions:\\n<tools>' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '\\n' -}}
{{- {'name': function.name, 'description': function.description,
     'parameters': function.parameters} | tojson -}}
{%- endfor -%}
{{- '\\n</tools>\\nTo call one, answer with its name and arguments as JSON inside ' -}}
{{- 'tool_call tags.<|im_end|>\\n' -}}
{%- endif -%}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content -}}
{{- '\\n</tool_response>' + (' /think' if thinks and loop.last else '') + '<|im_end|>\\n' -}}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{%- if function.arguments is string -%}{{- function.arguments -}}
{%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- (' /think' if thinks and loop.last else '') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
