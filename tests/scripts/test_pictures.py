"""scripts/dev/pictures.py draws the pictures of the documents."""

import struct
import sys

import pictures
import pytest
from support.project import ROOT

from minilora.system.errors import run_script

NAMES = ("codes.png", "error.png", "lora.png", "memory.png")


def size_of(png: bytes) -> tuple[int, int]:
    """Return width and height from the header chunk, which follows the eight bytes of the signature."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR"
    return struct.unpack(">II", png[16:24])


def test_the_script_draws_the_four_pictures_that_the_documents_show(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(tmp_path / "new")])
    run_script(pictures.main)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == list(NAMES)
    texts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
    for name in NAMES:
        drawn = (tmp_path / "new" / name).read_bytes()
        assert (
            size_of(drawn) == size_of((ROOT / "docs/pictures" / name).read_bytes()) and len(drawn) < 150_000
        )
        assert f"](pictures/{name})" in texts
    assert capsys.readouterr().out.count(".png\n") == len(NAMES)


def test_an_output_that_is_a_file_is_a_mistake_of_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(output)])
        with pytest.raises(SystemExit) as end:
            run_script(pictures.main)
        out, err = capsys.readouterr()
        assert (
            end.value.code == 2 and out == "" and err.count("\n") == 1 and f"error: --output {output}" in err
        )
    assert (tmp_path / "file").read_text() == "kept"
