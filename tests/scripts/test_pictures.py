"""scripts/dev/pictures.py draws the pictures of the documents."""

import re
import struct
import sys
from xml.etree import ElementTree

import diagrams
import idea_pictures
import pictures
import pytest
import torch
from support.project import ROOT

from minilora import PRESETS
from minilora.formats.config_json import parse_config
from minilora.memory.activations import layer_bytes, widths_of
from minilora.recompute import POLICIES
from minilora.system.errors import run_script

TEXTS = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
DRAWN_BY_SNIPPETS = set(re.findall(r'savefig\("([\w.]+)"', TEXTS))
SHOWN = set(re.findall(r"\]\(pictures/([\w.]+)\)", TEXTS))


def size_of(path) -> tuple[int, int]:
    """Return width and height from the header chunk, which follows the eight bytes of the signature."""
    png = path.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR"
    return struct.unpack(">II", png[16:24])


def test_the_script_draws_the_pictures_that_the_documents_show_and_no_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(tmp_path)])
    run_script(pictures.main)
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (ROOT / "docs/pictures").iterdir()} == SHOWN
    assert names == SHOWN - DRAWN_BY_SNIPPETS
    for name in names:
        drawn, shown = tmp_path / name, ROOT / "docs/pictures" / name
        assert drawn.stat().st_size < 150_000 and shown.stat().st_size < 150_000
        size = view_box if name.endswith(".svg") else size_of
        assert size(drawn) == size(shown)
    assert capsys.readouterr().out.count("\n") == len(names) > 15


def view_box(svg) -> str:
    return ElementTree.parse(svg).getroot().get("viewBox")


@pytest.mark.parametrize("draw", diagrams.DIAGRAMS)
def test_a_diagram_is_the_same_each_time_and_needs_no_font_of_the_reader_and_no_background(draw):
    svg = pictures.picture_of(draw, "svg")
    assert svg == pictures.picture_of(draw, "svg")
    assert b"<text" not in svg and b"<dc:date" not in svg
    assert svg.count(b"fill: #ffffff") >= 1  # of the whole figure: black words on a dark page cannot be read


@pytest.mark.parametrize("draw", diagrams.DIAGRAMS)
def test_all_words_of_a_diagram_lie_within_it(draw):
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10}):
        figure = pyplot.figure()
        draw(figure)
        canvas = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(canvas) for text in figure.axes[0].texts if text.get_text()]
        edge = figure.bbox
        pyplot.close(figure)
    assert all(edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0 and b.y1 <= edge.y1 for b in boxes)


def test_the_diagram_of_a_layer_shows_the_bytes_that_the_ledger_counts():
    mistral, tokens = parse_config(diagrams.MISTRAL_7B), 4096
    products = frozenset(f"{letter}_proj" for letter in "qkvo")
    widths = widths_of(mistral, torch.float16, "cuda")
    layer = layer_bytes(mistral, PRESETS["standard_r8_qkvo"], products, tokens, widths)
    counted = dict(off=layer.input + layer.kept, selective=layer.input + layer.attention, full=layer.input)
    assert set(diagrams.KEPT) == set(POLICIES) and diagrams.KEPT["offload"] == set()
    for policy, size in counted.items():
        drawn = sum(diagrams.layer_tensors()[name] for name in diagrams.KEPT[policy])
        in_D = size / (tokens * mistral.hidden_size * 2)
        # The diagram omits single numbers: 1 / rms, 32 log-sum-exps in float32, x A^T of rank 8, copies of A, B.
        assert drawn <= in_D <= drawn + 0.06, policy


def test_the_picture_of_the_grid_shows_the_tile_of_the_kernel():
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from minilora.kernels import nf4

    assert idea_pictures.TILE == nf4.TILE


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
