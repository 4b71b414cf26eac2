"""`python scripts/train.py` turns a model that cannot answer into one that can, also about unseen people."""

import json
import re
import subprocess
import sys

from support.project import ROOT

from minilora import QuantConfig, load_adapter, load_model, load_tokenizer
from minilora.data.rows import read_rows
from minilora.inference.evaluation import answers, exact_match
from minilora.system.device import choose_placement


def test_the_default_run_turns_rambling_into_answers_about_people_never_asked_about(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    said = re.search(
        r"exact answers to (\d+) held-out prompts: ([\d.]+)% before, ([\d.]+)% after", run.stdout
    )
    count, before, after = (float(group) for group in said.groups())
    assert count >= 200 and before <= 5 and after >= 95
    output = tmp_path / "outputs" / "default"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["eval_loss"] < 0.1 < 2 < records[0]["eval_loss"]
    # The saved adapter, loaded onto the quantized base, gives the answers that the run counted.
    placement = choose_placement()  # that of the run
    model = load_model(ROOT / "assets" / "base", QuantConfig(), placement.dtype, placement.device)
    tokenizer = load_tokenizer(output)
    load_adapter(model, output)
    rows = read_rows(ROOT / "assets" / "test.jsonl")[: int(count)]
    assert round(100 * exact_match(answers(model, tokenizer, rows), rows), 1) == after
