"""From files of any form to token ids, and which of them are learned. Read in this order:

readers.py          a path, an address or a hub dataset -> records, each with its file and line
splits.py           which files of a dataset are read
file_formats.py     the records of one file, within limits
rows.py             a record -> prompt and completion, a conversation, or plain text
mixing.py           several datasets, by their weights
messages.py         conversations in the forms in which people keep them
tokenizer.py        text -> ids and back, by one of the two tokenizer_backends.py
new_tokens.py       a model's tokenizer with tokens of your own
stream_decoder.py   ids that arrive one by one -> text
templates.py        chat templates as text; jinja_sandbox.py runs them, those of strangers in the process
                    that template_process.py starts
chat.py             a conversation -> ids, and which of them are answers; markers.py finds them in the text
truncation.py       what becomes of an example that is too long
examples.py         rows -> examples -> batches, and the order in which they are learned
packing.py          several short examples in one row
prepared.py         tokens that were saved earlier
mask_view.py        an example as text, its learned tokens highlighted
"""
