"""Kubernetes' schema of what deploy/kuberay uses, cut out of the package kubernetes-validate.

``python -m tests.deploy.kubernetes_schema`` writes it again, where the package is installed.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "kubernetes-1.37.schema.json"
VERSION = "1.37.0"
_KINDS = ("core.v1.PodTemplateSpec", "core.v1.ResourceRequirements", "core.v1.EnvVar", "core.v1.ConfigMap")
_REFERENCE = re.compile(r'"\$ref": "[^"]*/([^"/]+)"')


def cut_out() -> dict[str, Any]:
    """The strict definitions (no unknown fields) that _KINDS need, without their descriptions."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    found: dict[str, Any] = {}
    waiting = [f"io.k8s.api.{kind}" for kind in _KINDS]
    while waiting:
        name = waiting.pop()
        if name not in found:
            text = json.dumps(_without_descriptions(definitions[name]))
            waiting += _REFERENCE.findall(text)
            found[name] = json.loads(_REFERENCE.sub(r'"$ref": "#/$defs/\1"', text))
    source = f"kubernetes-validate {VERSION}, schemas of Kubernetes {VERSION}, Apache License 2.0"
    return {"$comment": source, "$defs": dict(sorted(found.items()))}


def _without_descriptions(value: Any, fields: bool = False) -> Any:
    """The same schema; ``fields`` if the keys are names of fields."""
    if isinstance(value, list):
        return [_without_descriptions(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_descriptions(item, fields=key == "properties" and not fields)
        for key, item in value.items()
        if fields or key != "description"
    }


def text() -> str:
    return json.dumps(cut_out(), separators=(",", ":"), sort_keys=True).replace('"io.k8s', '\n"io.k8s') + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
