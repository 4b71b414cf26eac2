"""Text from a trained adapter, and how good it is. Read in this order:

load.py          base model, adapters, tokenizer, template and settings, found from an output directory
generation.py    one token after another: KV cache, sampling, batches of prompts of different lengths
token_graph.py   a token's layers as one launch of a GPU
assistant.py     conversations that reuse the KV cache from turn to turn; for scripts/chat.py
store.py         many adapters: a few on the device, more in memory, all of them on disk
evaluation.py    loss, perplexity, exact match, ROUGE, BLEU
"""
