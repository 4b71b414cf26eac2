"""Chat templates run in a sandbox: a template is a Jinja program that writes a conversation as text.

A template comes with a model's files, so a stranger wrote it. In Jinja's sandbox it can read no file, reach
no Python internals and change no message. Whitespace, filters, functions and the tags {% generation %} and
{% break %} work as in transformers' `apply_chat_template`.

The sandbox cannot count steps or bytes: nested loops run for hours, 'a' * 10**10 takes all memory. So this
file is also a program, which `minilora.data.template_process` starts for templates of strangers. It imports
nothing but Jinja, and gives up what a rendering does not need: memory beyond 1 GiB, files, processes. A
timer of the operating system ends it after 5 seconds of computing.
"""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # computing time of a rendering
MEMORY = 2**30  # bytes of the process that renders
# Every request adds to the time that is left. A usual template needs a hundredth of it.
_SECONDS_PER_REQUEST = 0.01
_SECONDS_PER_BYTE = 1e-6
_LONGEST_MESSAGE = 300  # characters of an error message, which a template may word itself


class TemplateError(Exception):
    """What is wrong with a template or with a conversation. The text completes "the chat template ..."."""


# ---- the sandbox -------------------------------------------------------------------------------------------


def render(source: str, variables: dict[str, object]) -> str:
    """Return the text that a template writes with these variables: `messages` and what else it may use.

    Raises TemplateError with the template's own message, such as "roles must alternate".
    """
    try:
        return compile_template(source).render(tools=None, documents=None, **variables)
    except TemplateError:
        raise
    except Exception as error:  # a template is a program and can fail in every way
        raise TemplateError(f"says: {_one_line(error)}") from error


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """Return the compiled template. Raises TemplateError with the line if it is not valid Jinja."""
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
        message = f"is not valid Jinja, line {error.lineno}: {_one_line(error)}"
        raise TemplateError(message) from error
    except Exception as error:  # too deep nesting, too long numbers, names that Python reserves
        raise TemplateError(f"cannot be compiled: {_one_line(error)}") from error


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
    message = getattr(error, "message", None) or str(error)
    line = " ".join(str(message)[: 10 * _LONGEST_MESSAGE].split()) or type(error).__name__
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."


# ---- the program: a line of JSON for each request, a line for each reply -----------------------------------


def serve() -> None:
    """Answer requests until the other process closes the pipe or dies."""
    _warm_up()
    _give_up_powers()
    seconds_left, source = SECONDS, ""
    for line in sys.stdin.buffer:
        seconds_left += _SECONDS_PER_REQUEST + _SECONDS_PER_BYTE * len(line)
        _set_timer(min(seconds_left, SECONDS))
        source, reply = _answer(line, source)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
        seconds_left = _stop_timer()


def _answer(line: bytes, source: str) -> tuple[str, bytes]:
    """Return the source of the template, which a request names only if it changes, and the reply.

    A request without messages only compiles the template.
    """
    try:
        request = decode(line)
        source = request.pop("source", source)
        text = _render_request(source, request)
        if len(text) > (limit := longest_text(len(line))):
            raise TemplateError(f"writes {len(text):,} characters, more than {limit:,}")
        return source, encode({"text": text})
    except TemplateError as error:
        return source, encode({"error": str(error)})
    except MemoryError:
        return source, encode({"error": f"needs more than {MEMORY / 2**30:g} GiB of memory"})


def _render_request(source: str, request: dict) -> str:
    if "messages" not in request:
        compile_template(source)
        return ""
    now = datetime.fromisoformat(request.pop("now"))
    return render(source, request | {"strftime_now": now.strftime})


def longest_text(request_length: int) -> int:
    """Return how many characters the text for a request of so many bytes may have.

    The usual templates add some fifty characters to a message.
    """
    return 2**18 + 16 * request_length


def encode(value: dict) -> bytes:
    """Return a value as one line of JSON, halves of surrogate pairs included."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def decode(line: bytes) -> dict:
    """Return the value that `encode` wrote."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _warm_up() -> None:
    """Let Python and Jinja import what they import late, since no file can be opened afterwards."""
    modules = "textwrap pprint jinja2.debug jinja2.constants encodings.unicode_escape encodings.ascii"
    for name in modules.split():
        importlib.import_module(name)
    with suppress(TemplateError):  # a failure imports more than a success
        render("{{ raise_exception('\\n') }}", {})


def _give_up_powers() -> None:
    """Limit the memory, and allow neither files, connections nor processes."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    limits = {"AS": MEMORY, "NOFILE": 3, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, limit in limits.items():
        with suppress(ValueError, OSError):  # a lower limit is set already, or macOS has no such limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _set_timer(seconds: float) -> None:
    """End this process after so many seconds of computing. Even a C function that never returns is ended."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    else:  # Windows
        import faulthandler

        faulthandler.dump_traceback_later(seconds, exit=True)


def _stop_timer() -> float:
    """Return the seconds that were left."""
    if hasattr(signal, "setitimer"):
        return signal.setitimer(signal.ITIMER_PROF, 0)[0]
    import faulthandler

    faulthandler.cancel_dump_traceback_later()
    return SECONDS
