"""A trained adapter at work. Read in this order:

load.py          base model, adapter, tokenizer and template from an output directory
generation.py    tokens one by one: cache, sampling, batches of different lengths
assistant.py     conversations with settings that change in between; for scripts/chat.py
evaluation.py    loss, perplexity, exact match, ROUGE, BLEU
"""
