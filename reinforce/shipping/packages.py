"""Optional packages that ONNX export needs."""

from __future__ import annotations

import importlib.util

from reinforce.errors import UserError

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_export_packages() -> None:
    """Raise UserError if a package of the extra `export` is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: run pip install -e '.[export]' in the checkout")
