"""Paths of the small model, its data and its settings, which come with a clone of the repository."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
EMBEDDED_MODEL = ASSETS / "base"
DEFAULT_RUN = ASSETS / "default.yaml"  # the run to train if no config, model or dataset is given
