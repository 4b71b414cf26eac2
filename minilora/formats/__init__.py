"""Files that other programs read and write, each exactly as they do. Read in this order:

config_json.py       config.json <-> ModelConfig: every field is honoured, harmless or refused
weights.py           safetensors <-> model, tensor by tensor; bnb.py: bitsandbytes' 4-bit entries
adapter.py           PEFT's adapter files; adapter_header.py: what one holds, from its header alone
lint.py              does an adapter load in PEFT, vLLM, SGLang?
gguf.py              one file for llama.cpp; gguf_vocabulary.py: its tokenizer
"""
