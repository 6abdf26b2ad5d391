"""Systems beside the single merged model: what several fine-tunes can also become.

Each module makes one of them from models and reads it back: experts behind a router, one checkpoint
with a mask per task, a family of models with a preference as input, an adapter.
"""
