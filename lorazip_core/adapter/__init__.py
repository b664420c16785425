"""PEFT LoRA adapters on disk: read lazily, checked, and written back.

An adapter is a directory with ``adapter_config.json`` and weights. For each target module it holds factors
``B`` [d_out, r] and ``A`` [r, d_in] of an update ``ΔW = scale · B A``, with scale = alpha/r, or alpha/√r with rsLoRA.
"""
