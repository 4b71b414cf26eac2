"""Chat templates run in a sandbox: a template is a Jinja program that writes a conversation as text.

A template comes with a model's files, so a stranger wrote it. In Jinja's sandbox it can read no file, reach
no Python internals and change no message. Whitespace, filters, functions and the tags {% generation %} and
{% break %} work as in transformers' `apply_chat_template`.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.system.errors import UserError


def render(source: str, messages: Sequence[dict], **variables: object) -> str:
    """Return the text that a template writes for a conversation.

    Raises UserError with the template's own message, such as "roles must alternate".
    """
    try:
        return compile_template(source).render(messages=messages, tools=None, documents=None, **variables)
    except Exception as error:  # a template is a program and can fail in every way
        raise UserError(_one_line(error)) from error


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """Return the compiled template. Raises UserError with the line if it is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    # A function in place of the class: with the class, dict.update(messages[0], ...) could change a message.
    environment.globals["dict"] = lambda *items, **named: dict(*items, **named)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        message = f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        raise UserError(message) from error
    except Exception as error:  # too deep nesting, too long numbers, names that Python reserves
        raise UserError(f"the chat template cannot be compiled: {_one_line(error)}") from error


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: prints its body between the two `generation_markers`.

    Without that variable, as in every other program, the block prints its body alone.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _enclose(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        start, end = context.get("generation_markers", ("", ""))
        return start + caller() + end


def _to_json(value: object, ensure_ascii: bool = False, **options: object) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
