"""Adapters on their base model: what compression does to its answers, and what the inputs of its modules are like.

`extra` says whether Transformers is there, and `base_model` loads with it. `rows` are the user's, `prompts` makes
tokens of them, `batches` pads these. `hooks` puts an update on the model, `fitting` says whether it can be. `scoring`
compares answers row by row, `bootstrap` says how sure a ratio is, and `judge` does it for adapter after adapter, into a
`report`. `inputs` watches what goes into modules and `calibrate` averages it, into the file that `moments` reads.
"""
