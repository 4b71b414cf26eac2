"""Mistakes that the user can fix, reported in one line.

A mistake of the user is a `UserError`. Its text names the wrong value, where it is and how to fix it.
Scripts run their `main` through `run_script`, which prints this one line to stderr and exits with code 2,
without a traceback. It does the same for every error of the operating system, such as a full disk or a
missing permission, and for memory that runs out. Signals end a script in one line, too; see signals.py. Every
other exception is a bug in this program and keeps its traceback.
"""

import argparse
import difflib
import errno
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from minilora.system.children import end_with_parent
from minilora.system.redaction import Address, hide_secrets, is_address, without_secrets
from minilora.system.signals import Terminated, received, signals_raise, silence_closed_output
from minilora.system.terminal import escape_what_the_console_lacks, printable


class UserError(ValueError):
    """A mistake that the user can fix. The message says in one line what is wrong, where, and what helps."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    def _render_traceback_(self) -> list[str]:  # IPython asks for it: in a notebook, too, it is one line
        return [f"{type(self).__name__}: {self}"]


def one_line(text: str) -> str:
    """A message in one line of at most 490 characters, whatever the values in it hold.

    Secrets are cut out, quoted values after 80 characters, and the middle of other words beyond 200. Control
    characters, which could move the cursor or hide text in a terminal, are written as escapes.
    """
    if len(text) > 20_000:
        text = text[:10_000] + text[-10_000:]
    text = printable(without_secrets(" ".join(text.splitlines())))
    # A quote behind a letter is an apostrophe. Inside of a quoted value, repr escapes the quote.
    text = re.sub(r"(?<!\w)(['\"])((?:(?!\1)[^\\]|\\.){80})(?:(?!\1)[^\\]|\\.)+\1", r"\1\2...\1", text)
    text = re.sub(r"(\S{120})\S{4,}(\S{76})", r"\1...\2", text)
    return text if len(text) <= 490 else f"{text[:290]} ... {text[-195:]}"


def local_path(text: str) -> Path:
    """The type of an option that takes a path on this machine and no address."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{Address(text)} is an address; name a path on this machine")
    return Path(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviated options, that raises UserError instead of printing its usage.

    Options are written as the trainer's keys are: hyphens work like underscores, and a switch may be followed
    by true or false.

    With `help_text`, such as a script's docstring, --help prints exactly this text.
    """

    def __init__(self, help_text: str | None = None, **settings):
        super().__init__(allow_abbrev=False, **settings)
        self.help_text = help_text

    def format_help(self) -> str:
        return super().format_help() if self.help_text is None else self.help_text

    @property
    def names(self) -> list[str]:
        """The options without their hyphens."""
        return [option.removeprefix("--") for action in self._actions for option in action.option_strings]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Read options as argparse does. Refuse empty and repeated ones, and hide secrets of addresses."""
        words = self._as_declared(sys.argv[1:] if args is None else args)
        self._refuse_empty(words)
        self._refuse_repeated(words)
        options, rest = super().parse_known_args(words, namespace)
        for name, value in vars(options).items():
            if isinstance(value, list):
                setattr(options, name, [hide_secrets(entry) for entry in value])
            else:
                setattr(options, name, hide_secrets(value))
        return options, rest

    def _as_declared(self, words: Sequence[str]) -> list[str]:
        """The same words with underscores in options, and with switches that are alone or left out."""
        declared = {name: action for action in self._actions for name in action.option_strings}
        result, rest = [], list(words)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            underscored = "--" + name[2:].replace("-", "_")
            if word.startswith("--") and name not in declared and underscored in declared:
                name, word = underscored, underscored + equals + value
            if isinstance(declared.get(name), argparse._StoreTrueAction):
                if not equals and rest and rest[0].lower() in ("true", "false"):
                    value = rest.pop(0)
                if value.lower() in ("true", "false"):
                    word = name
                if value.lower() == "false":
                    continue
            result.append(word)
        return result

    def _refuse_empty(self, words: Sequence[str]) -> None:
        unnamed = " or ".join(action.metavar or action.dest for action in self._get_positional_actions())
        for before, word in zip(["", *words], words, strict=False):
            if word == "" or re.fullmatch(r"--[\w-]+=", word):
                option = word[:-1] or (before if before.startswith("--") else unnamed or "a word")
                raise UserError(f"{option} is empty; give it a value, or leave it out")

    def _refuse_repeated(self, words: Sequence[str]) -> None:
        names = [word.partition("=")[0] for word in words]
        for action in self._actions:
            takes_one = action.nargs != 0 and not isinstance(action, argparse._AppendAction)
            if takes_one and sum(name in action.option_strings for name in names) > 1:
                raise UserError(f"{action.option_strings[0]} is given twice; leave one of them out")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def raise_error(error: UserError) -> None:
    """The default `on_error` of readers: stop at the first bad row. `list.append` collects all errors."""
    raise error


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The tail of an error message about an unknown name: "; nearest: 'v_proj'", or "; known: a, b".

    Where none is near, `otherwise` says where a long list of the known names is.
    """
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {match[0]!r}" if match else f"; {otherwise or 'known: ' + ', '.join(sorted(known))}"


def summarize(problems: list[str], limit: int = 8) -> str:
    """Several problems in one line: the first `limit` of them, and how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


# What a script holds until it ends, such as the lock of its output directory.
until_end = ExitStack()


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 a mistake of the user, 130 Ctrl-C, 128 + n for signal n."""
    escape_what_the_console_lacks()
    try:
        with signals_raise(), until_end:
            end_with_parent()
            main()
            print(end="", flush=True)  # reports a closed pipe here instead of at Python's exit
    except BrokenPipeError:  # the reader has gone, as in `| head`
        _exit(128 + signal.SIGPIPE)
    except (KeyboardInterrupt, Terminated, Exception) as error:
        interruption = _interruption(error) or received()
        if isinstance(interruption, KeyboardInterrupt):
            _exit(128 + signal.SIGINT, "interrupted")
        if isinstance(interruption, Terminated):
            _exit(128 + interruption.signal, str(interruption))
        if (reason := _reason(error)) is None:
            raise
        _exit(2, f"error: {UserError(reason)}")


def _exit(code: int, line: str = "") -> NoReturn:
    """Exit with a line on stderr. Python's own flush at the exit then fails for no stream."""
    with suppress(OSError):
        print(line, end="\n" * bool(line), file=sys.stderr, flush=True)
    silence_closed_output()
    sys.exit(code)


def _interruption(error: BaseException | None) -> BaseException | None:
    """The signal's exception that an error is or wraps, or None.

    Python wraps whatever falls into the definition of a class, for example during an import.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__cause__ or error.__context__
    return error


def _reason(error: BaseException) -> str | None:
    """What the user can change about an error, or None if the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        # The second file name of a copy or a rename is the file to be written.
        path, reason = error.filename2 or error.filename, error.strerror or str(error)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            reason = "too many open files; raise the limit, such as `ulimit -n 4096`"
        return f"{path}: {reason}" if path else reason
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        return f"{error.object!r} is no name of a file where these are {error.encoding}; set PYTHONUTF8=1"
    # PyTorch's errors for a full memory are RuntimeErrors with these words.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))
        where = "the GPU is out of memory" if "CUDA" in str(error) else "out of memory"
        return f"{where}{f', {size[1]} were asked for' if size else ''}; see docs/out_of_memory.md"
    return None
