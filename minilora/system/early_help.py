"""--help in a moment: a script answers it before it imports torch, which takes seconds.

The text is the script's docstring. It is all that is known so early, and it is better than a list of options:
it says what they are for. A test holds that it names every option, with its default and its choices.
"""

import sys

from minilora.system.errors import run_script


def answer_help(text: str) -> None:
    """Print the text and end the program, if its command line asks for help."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        run_script(lambda: print(text, end=""))
        sys.exit()
