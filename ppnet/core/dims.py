"""The legend of dimension letters, used in every einsum, docstring and shape.

| letter | dimension | letter | dimension |
| --- | --- | --- | --- |
| B | batch | V | vocabulary |
| T | queries, or tokens of a sequence | L | layers |
| S | key tokens | P | image patches: one token each |
| N | query heads | A | tokens of a recording |
| K | key and value heads | F | frames of a recording, or mlp features |
| G | query heads per key head | M | mel bands, or cepstral coefficients |
| H | features of a head; image height | W, C | image width, channels |
| D | features of the model | I, O | input and output features |

In configurations they are words: `embed_dim`, `num_heads`, `num_kv_heads`,
`head_dim`, `mlp_dim`, `vocab_size`, `num_layers`, `max_seq_len`.
"""
