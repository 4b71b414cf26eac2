"""Where the small model, its data and its settings lie that come with a clone of the repository."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
EMBEDDED_MODEL = ASSETS / "base"
DEFAULT_RUN = ASSETS / "default.yaml"  # what runs where no config, model or dataset is named
