"""A Hugging Face Hub on loopback, for tests: it answers the client as the Hub does, and goes wrong as it is told.

with HubServer(Repository.of("org/adapter", {"adapter_config.json": b"{}"})) as hub:
    hub.faults.add(Status(503), method="GET", path="adapter_config", nth={1})
    HfApi(endpoint=hub.url).model_info("org/adapter")
    hub.log.requests

Whoever asks is the unmodified huggingface_hub: in this process by `endpoint=`, in another one by HF_ENDPOINT. There is
no Xet (files come from the CDN by plain HTTP, as they do to clients without hf_xet), no compression of answers, no
uploads, no git protocol, no If-None-Match, and there are no repositories of data sets and spaces.
"""

from .answers import Answer, Request
from .cdn import SIGNATURE
from .faults import Call, Cut, Delay, Drip, Faults, Flip, RateLimit, Resize, Rule, Silence, Status, too_many_requests
from .log import Log, Record
from .process import HubProcess, hub_process, repositories_of
from .repository import LFS_BYTES, Catalogue, Collection, Commit, File, Item, Repository
from .server import HubServer

__all__ = [
    "LFS_BYTES",
    "SIGNATURE",
    "Answer",
    "Call",
    "Catalogue",
    "Collection",
    "Commit",
    "Cut",
    "Delay",
    "Drip",
    "Faults",
    "File",
    "Flip",
    "HubProcess",
    "HubServer",
    "Item",
    "Log",
    "RateLimit",
    "Record",
    "Repository",
    "Request",
    "Resize",
    "Rule",
    "Silence",
    "Status",
    "hub_process",
    "repositories_of",
    "too_many_requests",
]
