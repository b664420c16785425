"""How an update is represented in a bundle: one file for each scheme, and a registry.

`scheme` says what the rest of lorazip asks of a scheme. `bases` and `factors` hold what two schemes have in common.
"""
