"""A page for the browser of one or more runs: curves, figures, settings and answers, in one file.

    page.html     the frame: what is where, with {{style}}, {{script}}, {{content}} and two {{..._digest}}
    page.css      the looks, in light and dark, on screens of any width
    page.js       draws everything from the content

The file loads nothing, so it can be kept, copied and sent. Names, settings and answers are texts of
strangers, who might write `</script>` into them. Three things keep them texts. The content is JSON in which
every < is escaped, so nothing in it ends its element. The script puts texts into the page as text, never as
HTML. And the policy in the page's head names the style and the script by their digests, and allows no other
and no address at all.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from minilora.run.plots import noise_window, series
from minilora.system.files import to_json
from minilora.system.terminal import visible

CURVES = ("loss", "eval_loss", "lr", "grad_norm", "memory", "tokens_per_second")
MOST_PROMPTS = 200  # on a page; answers.jsonl has all of them


def make_page(
    names: Sequence[str],
    records: Sequence[list[dict]],
    figures: Sequence[dict[str, str]],
    settings: Sequence[dict],
    answers: Sequence[list[dict[str, str]]],
) -> str:
    """The HTML of runs called `names`; of the others, each but `settings` has an entry for each run.

    records: the lines of metrics.jsonl. figures: heading -> text. settings: name, values and `differs` of
    each setting. answers: the lines of answers.jsonl.
    """
    prompts = side_by_side(answers)
    content = {
        "names": [visible(name) for name in names],
        "curves": [curves(each) for each in records],
        "window": max(noise_window(series(each, "loss")[1]) for each in records),
        "headings": list(figures[0]),
        "figures": [list(row.values()) for row in figures],
        "settings": [
            setting | {"name": visible(setting["name"]), "values": list(map(visible, setting["values"]))}
            for setting in settings
        ],
        "prompts": prompts[:MOST_PROMPTS],
        "left_out": len(prompts[MOST_PROMPTS:]),
    }
    folder = Path(__file__).parent
    frame, style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    parts = {
        "style": style,
        "style_digest": _digest(style),
        "script": script,
        "script_digest": _digest(script),
        "content": embedded(content),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], frame)


def curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) in the order of the steps, of the measurements that a run has."""
    found = {name: sorted(zip(*series(records, name), strict=True)) for name in CURVES}
    return {name: points for name, points in found.items() if points}


def side_by_side(answers: Sequence[list[dict[str, str]]]) -> list[dict]:
    """For each prompt of any run: what was expected, and each run's two answers, or None.

    Runs that share a held-out set meet in its prompts. If a run answers a prompt twice, the first answer
    counts.
    """
    prompts: dict[tuple[str, str], dict] = {}
    for number, run in enumerate(answers):
        for line in run:
            key = visible(line["prompt"]), visible(line["expected"])
            nobody = {"base": [None] * len(answers), "adapted": [None] * len(answers)}
            row = prompts.setdefault(key, {"prompt": key[0], "expected": key[1]} | nobody)
            for model in ("base", "adapted"):
                if row[model][number] is None:
                    row[model][number] = visible(line[model])
    return list(prompts.values())


def embedded(content: dict) -> str:
    """JSON that may stand in an element of HTML: no text in it ends the element, or begins a comment."""
    return to_json(content, allow_nan=False).replace("<", "\\u003c")


def _digest(text: str) -> str:
    """The name of an inline script or style in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
