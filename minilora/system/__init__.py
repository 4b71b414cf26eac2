"""This machine and whatever lies beyond it. No file here knows what LoRA is.

errors.py        a user's mistake in one line; exit codes of scripts
files.py         JSON read with care, files written whole or not at all
cache.py         this user's cache, where nobody else can write
schema.py        JSON of other people, checked field by field against a table
patterns.py      regular expressions from files, matched in bounded time
device.py        which device and dtype to compute in, and why; peak memory
distributed.py   several processes that train one adapter
redaction.py     passwords stay out of everything that is printed, saved or sent
remote.py        files at any address: s3://, hf://, https://
hub.py           the Hugging Face hub: models in, adapters out
assets.py        where the small model lies that comes with minilora
"""
