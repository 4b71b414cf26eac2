"""What a check of a card has seen so far: a line of JSON for every event, and a table for people.

Each event has a `section`, `at` (seconds since the start), and one of these:

    head      {fact: value} about the card, the versions, the command: the first event
    began     the title of the section
    row       {column: value}: a line of the section's table; the names of columns end in their units
    note      a sentence
    claim     a sentence, and whether it `holds`
    failed    the error in one line; its `traceback` stands beside it
    skipped   why the section did not run; `wanted` says whether it should have run
    ended     the seconds that the section took

The table is made from the events alone, and it is written anew after each one. So a run that is killed leaves
the table of everything that was measured before.
"""

import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from minilora.system.files import read_json_lines, to_json, write_whole

LEGEND = (
    "Every figure was measured on this card, except in columns whose names begin with *predicted* or "
    "*limit*: those are computed. `docs/benchmarks/README.md` explains the sections."
)


@dataclass(frozen=True)
class Report:
    """The two files of a check."""

    lines: Path  # JSON Lines
    table: Path  # Markdown
    started: float = field(default_factory=time.perf_counter)  # the same clock in every process of the check

    def begin(self, **head: object) -> None:
        """Start both files anew."""
        self.lines.unlink(missing_ok=True)
        self.tell("check_gpu", head=head)

    def tell(self, section: str, **event: object) -> None:
        """Print an event, and write it to both files."""
        event = {"section": section, "at": round(time.perf_counter() - self.started, 1)} | event
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(to_json(event, default=str) + "\n")
        print(printed(event), flush=True)
        write_whole(self.table, markdown(self.events()))

    def events(self) -> list[dict]:
        return read_json_lines(self.lines)


def failures(events: list[dict]) -> list[str]:
    """Return a line for each section that failed or had no time, and for each claim that does not hold."""
    found = []
    for event in events:
        if "failed" in event:
            found.append(f"{event['section']}: {event['failed']}")
        elif event.get("skipped") and event["wanted"]:
            found.append(f"{event['section']}: skipped, {event['skipped']}")
        elif not event.get("holds", True):
            found.append(f"{event['section']}: not so: {event['claim']}")
    return found


def printed(event: dict) -> str:
    """Return the event as a line for the terminal."""
    match event:
        case {"head": head}:
            return "\n".join(f"{name:<14}{value}" for name, value in head.items())
        case {"began": title}:
            return f"\n{event['section']}: {title}"
        case {"row": row}:
            return "  " + ", ".join(f"{column} {figure(value)}" for column, value in row.items())
        case {"ended": seconds}:
            return f"  ({seconds:.0f} s)"
    return "  " + _sentence(event)


def markdown(events: list[dict]) -> str:
    """Return the table of these events: the card, the failures, and a chapter for each section."""
    head = next(event["head"] for event in events if "head" in event)
    facts = "\n".join(f"- {name}: {value}" for name, value in head.items() if name != "card")
    failed = "\n".join(f"- {line}" for line in failures(events))
    parts = [f"# {head['card']}", facts, LEGEND, f"**Failed:**\n\n{failed}" if failed else ""]
    names = dict.fromkeys(event["section"] for event in events if "began" in event)
    chapters = [_chapter([event for event in events if event["section"] == name]) for name in names]
    return "\n\n".join(part for part in (*parts, *chapters) if part) + "\n"


def _chapter(events: list[dict]) -> str:
    """Return the heading, the tables and the sentences of one section."""
    title = next(event["began"] for event in events if "began" in event)
    seconds = next((f"{event['ended']:.0f} s" for event in events if "ended" in event), "it did not end")
    rows = [event["row"] for event in events if "row" in event]
    tables = [_table(list(group)) for _, group in groupby(rows, key=lambda row: next(iter(row)))]
    sentences = [f"- {text}" for text in map(_sentence, events) if text]
    heading = f"## {events[0]['section']}: {title} ({seconds})"
    return "\n\n".join(part for part in (heading, *tables, "\n".join(sentences)) if part)


def _table(rows: list[dict]) -> str:
    """Return rows as Markdown. A column that a row lacks stays empty."""
    columns = dict.fromkeys(column for row in rows for column in row)
    lines = [columns, ["---"] * len(columns)]
    lines += [[figure(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _sentence(event: dict) -> str:
    """Return what an event says beside its figures, or an empty text."""
    match event:
        case {"note": text}:
            return text
        case {"claim": text, "holds": holds}:
            return f"{'ok' if holds else 'FAILED'}: {text}"
        case {"failed": text}:
            return f"FAILED: {text}"
        case {"skipped": text}:
            return f"skipped: {text}"
    return ""


def figure(value: object) -> str:
    """Return a value for people: three digits, thousands apart."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float() if abs(value) >= 100:
            return f"{value:,.0f}"
        case float() if value == 0 or abs(value) >= 0.001:
            return f"{value:.3g}"
        case float():
            return f"{value:.1e}"
    return str(value).replace("|", "\\|")
