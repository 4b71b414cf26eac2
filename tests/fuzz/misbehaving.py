"""A script that does what no script may do, so that the fuzzer is seen to notice it.

python -m fuzz.misbehaving REPORT runs it once for each of its ways.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from fuzz.case import make_case
from fuzz.judge import write_report
from fuzz.runner import run_cases
from minilora.system.errors import UserError

WAYS = {  # way: what the fuzzer says about it
    "well": "",
    "raise": "traceback: KeyError: 'x'",
    "succeed": "exit code 0, not 2",
    "hang": "hangs",
    "say nothing": "does not name the place",
    "say two lines": "stderr has 2 lines",
    "say too much": "a line of 607 characters",
    "colour": "the control character '\\x1b' on stderr",
    "tell": "the secret on stdout",
    "leave a file": "leaves work/left",
    "leave a temporary file": "leaves tmp/left",
    "change a file": "changes work/train.jsonl",
    "remove a file": "removes work/train.jsonl",
    "connect": "connects: socket.connect",
    "leave a process": "leaves a process running",
    "take memory": "does not name the place",
    "write to stdout what it cannot": "traceback: UnicodeEncodeError",
}


def main() -> None:
    match way := sys.argv[1]:
        case "raise":
            raise KeyError("x")
        case "succeed":
            return
        case "hang":
            time.sleep(60)
        case "say nothing":
            raise UserError("something is wrong")
        case "say two lines":
            print("by the way", file=sys.stderr)
        case "say too much":
            print("error: " + "x" * 600, file=sys.stderr)
            sys.exit(2)
        case "colour":
            print("\x1b[31m", end="", file=sys.stderr)
        case "tell":
            print("hunter2secret")
        case "leave a file":
            Path("left").touch()
        case "leave a temporary file":
            Path(os.environ["TMPDIR"], "left").touch()
        case "change a file":
            Path("train.jsonl").write_text("")
        case "remove a file":
            Path("train.jsonl").unlink()
        case "connect":
            socket.socket().connect_ex(("127.0.0.1", 9))
        case "leave a process":
            subprocess.Popen(["sleep", "60"])
        case "take memory":
            bytearray(3 << 30)
        case "write to stdout what it cannot":
            sys.stdout.reconfigure(errors="strict")
            print("caf\udce9")
    raise UserError(f"the place is wrong: {way}")


if __name__ == "__main__":
    cases = [
        make_case("misbehaviour", way, ["fuzz.misbehaving", way], "the place", secret="hunter2secret")
        for way in WAYS
    ]
    write_report(list(run_cases(cases, workers=2, seconds=6)), [], Path(sys.argv[1]))
