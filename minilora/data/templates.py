r"""The usual chat templates by name, written in Jinja, the language of the templates in tokenizers.

    alpaca     Below is an instruction ... ### Instruction:\n...\n\n### Response:\n
               (github.com/tatsu-lab/stanford_alpaca)
    llama2     <s>[INST] <<SYS>>\n...\n<</SYS>>\n\n... [/INST] ... </s>
    llama3     <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>
    mistral    <s>[INST] ... [/INST] ...</s>; fewer spaces where [INST] is a token (tokenizer v3)
    chatml     <|im_start|>user\n...<|im_end|>\n
    qwen3      chatml; the last answer begins with <think> ... </think>, which is cut out of older answers
    qwen3_all  chatml; every answer keeps its <think> ... </think>, or begins with an empty one: what
               LLaMA-Factory trains as `qwen3`
    deepseek3  <｜begin▁of▁sentence｜><｜User｜>...<｜Assistant｜>...<｜end▁of▁sentence｜>; no thoughts
    deepseekr1 the same; every answer keeps its thoughts, or begins with empty ones
    plain      one message after the other, and an end token behind each answer

{% generation %} ... {% endgeneration %} surround the text of the assistant: its answer and the end token. All
other tags and variables are those of transformers, except `space`: "" if the tokenizer itself puts
sentencepiece's "▁" in front of a text behind a special token, and " " if the template has to.

The source of a template is saved with an adapter and is part of the key of prepared tokens, so even a line
break in it is a change.
"""

_ALTERNATING = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for message in turns %}
    {%- if message.role != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('roles must alternate: user, assistant, user, ...; message ' ~ loop.index ~ ' is of ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

_ALPACA = r"""
{{- bos_token }}
{%- if system %}
    {{- system + '\n\n' }}
{%- elif turns[0].input %}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
    {{- 'Write a response that appropriately completes the request.\n\n' }}
{%- else %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.\n\n' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
        {{- '' if loop.last else '\n\n' }}
    {%- elif message.input %}
        {{- '### Instruction:\n' + message.instruction + '\n\n### Input:\n' + message.input + '\n\n### Response:\n' }}
    {%- else %}
        {{- '### Instruction:\n' + message.content + '\n\n### Response:\n' }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

_LLAMA2 = r"""
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endgeneration %}
    {%- else %}
        {%- set prefix = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if messages[0].role == 'system' and loop.first else '' %}
        {{- bos_token + space + '[INST] ' + (prefix + message.content) | trim + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

_LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

_MISTRAL_V1 = r"""
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- space + '[INST] ' + (system + '\n\n' if system and loop.first else '') + message.content + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

_MISTRAL_V3 = r"""
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- set words = message.content.rstrip(' ') %}
        {%- generation %}{{ (space + words if words else '') + eos_token }}{% endgeneration %}
    {%- else %}
        {%- set is_last = loop.index0 >= turns | length - 2 %}
        {%- set words = (system + '\n\n' if system and is_last else '') + message.content %}
        {{- '[INST]' + (space + words if words else '') + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""

_CHATML = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_QWEN3 = r"""
{{- bos_token }}
{%- set last = namespace(question=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- set words, thoughts = message.content, message.reasoning_content %}
        {%- if thoughts is not string and '</think>' in words %}
            {%- set thoughts = words.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set words = words.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or thoughts) %}
            {%- set words = '<think>\n' + (thoughts or '').strip('\n') + '\n</think>\n\n' + words.lstrip('\n') %}
        {%- endif %}
        {%- generation %}{{ words + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501

_THOUGHTFUL = r"""
{%- macro with_thoughts(message) %}
    {%- if message.reasoning_content %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- elif '<think>' not in message.content and '</think>' not in message.content %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content }}
{%- endmacro %}
"""

_DEEPSEEK = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<｜Assistant｜>' }}
        {%- generation %}{{ words(message) + eos_token }}{% endgeneration %}
    {%- else %}
        {{- '<｜User｜>' if message.role == 'user' else '' }}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' }}
{%- endif %}
"""

_PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {
    "alpaca": _ALTERNATING + _ALPACA,
    "llama2": _ALTERNATING + _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _ALTERNATING + _MISTRAL_V3,
    "chatml": _CHATML,
    "qwen3": _QWEN3,
    "qwen3_all": _THOUGHTFUL
    + _CHATML.replace("message.content + '<|im_end|>' }}{%", "with_thoughts(message) + '<|im_end|>' }}{%"),
    "deepseek3": _DEEPSEEK.replace("words(message)", "message.content"),
    "deepseekr1": _THOUGHTFUL + _DEEPSEEK.replace("words(message)", "with_thoughts(message)"),
    "plain": _PLAIN,
}
MISTRAL_V1 = _ALTERNATING + _MISTRAL_V1  # where [INST] is text, not a token
