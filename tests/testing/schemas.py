"""The JSON schemas in docs/schemas, generated from the types that are written: `python tests/testing/schemas.py`.

Those of older formats are no longer written, and stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from lorazip_core.adapter.lock import Lock
from lorazip_core.bundle.manifest import FORMAT_VERSION, Manifest
from lorazip_core.clustering.clusters_file import Assignment
from lorazip_core.clustering.run import ClusterReport
from lorazip_core.compress.run import CompressReport
from lorazip_core.export.exporter import ExportReport
from lorazip_core.fetch.report import FetchReport
from lorazip_core.info import InfoReport
from lorazip_core.maintain.add import AddReport
from lorazip_core.maintain.remove import RemoveReport
from lorazip_core.model.calibrate import CalibrateReport
from lorazip_core.planning.plan import PlanReport
from lorazip_core.verify.run import VerifyReport

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"
TYPES: dict[str, type] = {
    "add-1": AddReport,
    "bundle-2": Manifest,
    "calibrate-1": CalibrateReport,
    "cluster-1": ClusterReport,
    "clusters-1": Assignment,
    "compress-1": CompressReport,
    "export-1": ExportReport,
    "fetch-1": FetchReport,
    "info-1": InfoReport,
    "lock-1": Lock,
    "plan-1": PlanReport,
    "remove-1": RemoveReport,
    "verify-1": VerifyReport,
}
OLDER = ("bundle-1",)


def schema(name: str) -> dict[str, Any]:
    """The schema of a type, which allows fields that it does not know; an older one as it is in the folder."""
    if name in OLDER:
        older: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_bytes())
        return older
    (reference,), definitions = msgspec.json.schema_components([TYPES[name]], ref_template="#/$defs/{name}")
    top = definitions.pop(reference["$ref"].removeprefix("#/$defs/"))
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | top | {"$defs": definitions}
    written = {"format", "format_version"} if name.startswith("bundle") else {"schema"}
    if name.startswith("bundle"):  # the digest is of the type's fields, so it is none of them
        top["properties"]["manifest_sha256"] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
        top["properties"]["format_version"] = {"enum": [FORMAT_VERSION]}
        written.add("manifest_sha256")
    top["required"] = sorted({*top["required"], *written})
    return top


def text(name: str) -> str:
    return json.dumps(schema(name), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in TYPES:
        (FOLDER / f"{name}.json").write_text(text(name))
