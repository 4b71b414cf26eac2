"""One training run, except for its loop, which is in scripts/train.py. Read in this order:

settings.py      every key of a run, from the command line and YAML; yaml_file.py: YAML within limits
manual.py        what train.py --help prints of these keys, without importing them
llama_factory.py LLaMA-Factory's keys; dataset_info.py: its list of datasets
training_arguments.py: the keys of Hugging Face's TrainingArguments that are not ours
plan.py          every decision that needs no weights; datasets.py: the examples; curves.py: learning rates
memory_plan.py   ddp or fsdp, recompute and batches of evaluation, by the ledger
together.py      which runs share a model and its batches, and how many of them fit into memory
vocabulary.py    new tokens: the tokenizer with them, and their rows of the embedding
output_dir.py    the directory of results: is it writable, and which files of an earlier run are deleted?
checkpoints.py   everything that a resumed run needs; no kill leaves an incomplete checkpoint
full.py          finetuning_type: full; what a run trains is saved and loaded: an adapter, or a model
saved_state.py   what a checkpoint's state may hold, checked before use; random_state.py: seeds of dropout
divergence.py    a loss that is not finite: float16's range or the training, and the layer where it begins
stop_signal.py   Ctrl-C and other signals: the training saves first
tracker.py       progress and metrics.jsonl; plots.py: pictures; page.py: a page for the browser
report.py        summary, figures, uploads; describe.py: weights, layers and optimizer in words
model_card.py    README.md beside the adapter: its settings and figures, and a snippet that runs
answers.py       what base and adapted model answer, in answers.jsonl
reporters.py     metrics for services.py: MLflow, TensorBoard, W&B
sharing.py       results for others: the hub, S3
"""
