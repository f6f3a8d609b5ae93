"""The optional packages of ONNX export."""

from __future__ import annotations

import pytest

from reinforce.errors import UserError
from reinforce.shipping import packages


def test_missing_packages_are_named_with_the_command_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_PACKAGES", ("json", "no_such_package", "nor_this_one"))
    with pytest.raises(UserError, match=r"no_such_package, nor_this_one: run pip install -e '\.\[export\]'"):
        packages.require_export_packages()
    monkeypatch.setattr(packages, "_PACKAGES", ("json",))
    packages.require_export_packages()
