"""Where the folders of the repository lie: the small model with its data and settings, and the scripts."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def folder_of(name: str) -> Path:
    """A folder at the top of the repository: beside the package in a clone, and inside of it in a wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


ASSETS, SCRIPTS = folder_of("assets"), folder_of("scripts")
EMBEDDED_MODEL = ASSETS / "base"
DEFAULT_RUN = ASSETS / "default.yaml"  # the run to train if no config, model or dataset is given
