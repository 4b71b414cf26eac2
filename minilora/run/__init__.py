"""One training run around its loop, which is in scripts/train.py. Read in this order:

settings.py      every key of a run, from YAML and command line; llama_factory.py: LLaMA-Factory's words for them
plan.py          everything that is decided before a weight is read; datasets.py: its examples
output_dir.py    the folder of results: may it be written, and must something go?
checkpoints.py   everything that a resumed run needs, written so that no kill can spoil it
tracker.py       progress and metrics.jsonl; report.py: summary, model card; plots.py: pictures
reporters.py     MLflow, TensorBoard; sharing.py: the hub, S3
"""
