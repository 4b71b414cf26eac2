"""Chat templates: programs that come with a stranger's tokenizer."""

from collections.abc import Iterator
from itertools import cycle

from fuzz.bad_inputs.commands import CHAT_TEMPLATE
from fuzz.case import Case, make_case
from fuzz.edits import set_keys, write
from fuzz.place import CHAT_TEMPLATE as GOOD

KIND = "chat template"
COMMANDS = (
    CHAT_TEMPLATE,
    "prepare --model words --dataset chat.jsonl --output out",
    "evaluate --model words --dataset chat.jsonl --quantization_bit none",
    "chat --model words --instruction say --quantization_bit none",
)
TEMPLATES = {
    "an open tag": "{% for m in messages %}",
    "an open expression": "{{ messages",
    "an unknown tag": "{% explode %}",
    "an unknown filter": "{{ messages | explode }}",
    "an unknown test": "{% if messages is explosive %}{% endif %}",
    "an unknown variable's attribute": "{{ nothing.at.all }}",
    "an end without a begin": "{% endfor %}",
    "nested 1,000 deep": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "parentheses 10,000 deep": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "an integer of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "a loop of 10^8 in Python's range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that never prints": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}x",
    "a range of 10^12": "{% for i in range(10**12) %}{% endfor %}",
    "a text times 10^10": "{{ 'a' * 10**10 }}",
    "a list times 10^10": "{{ [1] * 10**10 }}",
    "a number to the power of 10^9": "{{ 7 ** (10 ** 9) }}",
    "a text that doubles": "{% set t = namespace(x='ab') %}{% for i in range(64) %}{% set t.x = t.x ~ t.x %}{% endfor %}{{ t.x }}",
    "a width of 10^10": "{{ '%10000000000d' % 1 }}",
    "a width of 10^10 in format": "{{ '{:10000000000}'.format(1) }}",
    "center to 10^10": "{{ 'a' | center(10**10) }}",
    "indent by 10^10": "{{ 'a\nb' | indent(10**10) }}",
    "ljust to 10^10": "{{ 'a'.ljust(10**10) }}",
    "lorem ipsum of 10^7 paragraphs": "{{ lipsum(n=10**7) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "replace that grows": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "ten gigabytes, printed in pieces": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "its own exception": "{{ raise_exception('surprise') }}",
    "an exception with an escape sequence": "{{ raise_exception('\x1b[2Jsurprise') }}",
    "an exception with line ends": "{{ raise_exception('one\n\r\ntwo') }}",
    "an exception of 100,000 characters": "{{ raise_exception('surprise' * 12500) }}",
    "an exception that is no text": "{{ raise_exception(messages) }}",
    "division by zero": "{{ 1 // 0 }}",
    "the wrong types": "{{ 1 + 'a' }}",
    "a class of Python's": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__globals__['os'].system('touch pwned') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "globals of raise_exception": "{{ raise_exception.__globals__['__builtins__']['open']('pwned', 'w') }}",
    "format to an attribute": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map to an attribute": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a change of a message": "{{ messages[0].update({'content': 'x'}) }}",
    "a message taken out": "{{ messages.pop() }}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import '/etc/passwd' as x %}",
    "an extends": "{% extends '/etc/passwd' %}",
    "an answer left out": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "an answer backwards": "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
    "answers sorted": "{{ messages | map(attribute='content') | join('') | list | sort | join('') }}",
    "a generation block that never ends": "{% generation %}x",
    "a generation block within another": "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "a generation block that is cut": (
        "{% set x %}{% generation %}hello{% endgeneration %}{% endset %}{{ x[2:] }}{{ messages[-1].content }}"
    ),
    "a role that it refuses": "{% if messages[0].role == 'user' %}{{ raise_exception('no users here') }}{% endif %}",
}  # fmt: skip
WORDS = "template|rows are wrong|no token to learn"  # prepare.py lists the rows above its error
TRAINING_ONLY = ("an answer left out", "an answer backwards", "answers sorted")
BLOCKS = ("a generation block within another", "a generation block that is cut")


def cases() -> Iterator[Case]:
    commands, trainers = cycle(COMMANDS), cycle(COMMANDS[:3])
    for name, template in TEMPLATES.items():
        command = next(trainers if name in TRAINING_ONLY + BLOCKS else commands)
        in_settings = set_keys("words/tokenizer_config.json", chat_template=template)
        in_a_file = write("words/chat_template.jinja", template)
        change = in_a_file if len(name) % 2 else in_settings
        title = f"{name} ({command.split()[0]})"
        yield make_case(KIND, title, command, WORDS, change=change, remarks=True)
    slow = GOOD + "{% for i in range(99999) %}{% for j in range(999) %}{% endfor %}{% endfor %}"
    for command in COMMANDS:
        yield make_case(
            KIND, f"a good one with a slow end ({command.split()[0]})", command, WORDS,
            change=write("words/chat_template.jinja", slow), remarks=True,
        )  # fmt: skip
