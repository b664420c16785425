"""Names that PEFT gives to files, and the prefix of its tensors.

This loads nothing else, so that a path can be looked at without torch.
"""

from __future__ import annotations

import re

CONFIG_NAME = "adapter_config.json"  # whatever the form: a folder with this file is an adapter
SAFETENSORS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
PICKLE = "adapter_model.bin"
SHARD = re.compile(r"adapter_model-[A-Za-z0-9._-]+\.safetensors")
PREFIX = "base_model.model."
