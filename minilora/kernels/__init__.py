"""The Triton kernels: a door to the folder `kernels/` at the top of the repository, where they are read.

No package at the top may have that name: it would hide the `kernels` of PyPI, which transformers and
bitsandbytes import. A wheel holds the kernels in this file's place.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
