"""Ctrl-C while a script starts or ends: one line and exit code 130, without a traceback.

Importing torch takes seconds, and Python's own answer to Ctrl-C is a traceback from the middle of it. So a
script that is run, and not imported, imports this module before anything else. From then on, Ctrl-C ends the
process at once; so early, there is nothing to clean up. `run_script` replaces the handler while `main` runs,
and puts it back after that, for the moment in which Python shuts down.

Before its first line a script cannot help: Python takes a moment to get there.
"""

import os
import signal


def _end(number: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it stays ignored, as in `nohup ... &`
    signal.signal(signal.SIGINT, _end)
