"""Regular expressions that come with a file, matched in bounded time.

An adapter may name its layers by a regular expression, and so its author decides how long the match takes.
Python's `re` tries one way after the other: (a+)+$ has 2^n ways to split n letters. `re` has no time limit.
No simple rule finds the slow patterns, because (a|a)(a|a)(a|a)... and a?a?a?aaa are slow, too, and nothing in
them is nested. An engine without backtracking would be fast, but it would be another engine than PEFT's.

So `re` itself compiles and matches, in a child process that is stopped after some seconds. A pattern that has
been matched in time can be matched with the same names again, directly.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from minilora.system.errors import UserError

SECONDS = 5.0  # A pattern that people write needs milliseconds, and Python's start far below a second.

_CHILD = """
import json, re, sys
patterns, names, method = json.load(sys.stdin)
try:
    matchers = [getattr(re.compile(pattern), method) for pattern in patterns]
    answer = [[name for name in names if match(name)] for match in matchers]
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    answer = str(error) or type(error).__name__
print(json.dumps(answer))
"""


def match_names(patterns: Sequence[str], names: Sequence[str], whole: bool = True) -> list[list[str]]:
    """For each pattern, the names that it matches: as a whole, as `re.fullmatch`, or else as `re.match`.

    Raises UserError for a pattern that is no regular expression, or takes more than SECONDS.
    """
    if not patterns:
        return []
    shown = f"{patterns[0]!r:.80}" if len(patterns) == 1 else f"one of {len(patterns)} patterns"
    question = json.dumps([list(patterns), list(names), "fullmatch" if whole else "match"])
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    try:
        child = subprocess.run(command, input=question, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        slow = f"{shown} takes more than {SECONDS:g} seconds to match; list the names of the layers instead"
        raise UserError(slow) from error
    if child.returncode:
        raise UserError(f"{shown} is not a regular expression that Python can match")
    answer = json.loads(child.stdout)
    if isinstance(answer, str):
        raise UserError(f"{shown} is not a regular expression: {answer}")
    return answer
