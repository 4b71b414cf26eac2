"""Credentials are taken out of every text that is printed, recorded or sent."""

import re


def without_secrets(text: str) -> str:
    """The text without user:password@ and ?query in its addresses, and with hub tokens and auth headers cut.

    A query may be a signature that grants access, so it goes as well.
    """
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1", text)
    text = re.sub(r"(\w://[^\s?]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\b(hf_|Bearer |Basic )[\w.=/+-]{8,}", r"\1...", text)
