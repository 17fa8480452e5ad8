"""Chat templates in the styles of current tokenizers, written after their documentation, and tokenizers with them."""

from typing import NamedTuple

from conftest import make_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast


class Style(NamedTuple):
    """A template, the tokenizer's EOS and BOS, and its other special tokens."""

    template: str
    eos: str
    bos: str | None
    special: tuple[str, ...] = ()


CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SMOLLM2 = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system
You are a helpful assistant<|im_end|>
{% endif %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system }}
{%- if tools %}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{% endif %}{{ '<|eot_id|>' }}
{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{- m['content'] | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for m in loop_messages %}
{%- if m['role'] == 'user' %}{%- if tools and loop.last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}
{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}
{%- elif m.tool_calls %}{{- '[TOOL_CALLS] ' }}{%- for call in m.tool_calls %}{{- call.function | tojson }}{%- endfor %}{{- eos_token }}
{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] | trim + eos_token }}
{%- elif m['role'] == 'tool' %}{{- '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"""

QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

OLMO2 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}
{%- if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""

PHI = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

DEEPSEEK_R1 = """{{ bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{- m['content'] }}
{%- elif m['role'] == 'user' %}{{- '<|User|>' + m['content'] }}
{%- elif m['role'] == 'assistant' %}{%- set content = m['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

IM = ("<|im_start|>",)
STYLES = {
    "chatml": Style(CHATML, "<|im_end|>", None, IM),
    "smollm2": Style(SMOLLM2, "<|im_end|>", "<|im_start|>"),
    "llama3": Style(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": Style(GEMMA, "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": Style(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]", "[TOOL_CALLS]")),
    "qwen3": Style(QWEN3, "<|im_end|>", None, (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>")),
    "olmo2": Style(OLMO2, "<|endoftext|>", "<|endoftext|>"),
    "phi": Style(PHI, "<|endoftext|>", None, ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek_r1": Style(DEEPSEEK_R1, "<|end_of_sentence|>", "<|begin_of_sentence|>", ("<|User|>", "<|Assistant|>")),
    "zephyr": Style(ZEPHYR, "</s>", "<s>", ("<|user|>", "<|assistant|>", "<|system|>")),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the special tokens and the template of a style."""
    style, tokenizer = STYLES[name], make_tokenizer()
    tokens = dict.fromkeys((style.eos, *([style.bos] if style.bos else ()), *style.special))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    tokenizer.eos_token, tokenizer.bos_token = style.eos, style.bos
    tokenizer.chat_template = style.template
    return tokenizer
