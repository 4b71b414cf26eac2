"""Many adapters on one base, for many requests at once: the server behind scripts/serve.py.

slots.py      keys and values of texts that begin and end at different times
sampling.py   the next token of every row, with settings and random numbers of its own
answers.py    a request, and its answer as it grows: text, stop strings, the reason of its end
engine.py     continuous batching: who joins the batch, who leaves it
sizes.py      how many slots fit into memory, and how long they are
models.py     the names that clients ask for: adapters with their own tokenizer and template
protocol.py   OpenAI's bodies: what is understood, and what is refused
writer.py     and how answers are written
app.py        the routes
replies.py    an answer on its way: whole, or as events
metrics.py    what is counted, for Prometheus

server.py     from a model's directory to a server that listens

The last four need the extra `serve`; nothing else imports them.
"""
