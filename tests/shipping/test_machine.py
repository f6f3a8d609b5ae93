"""Description of the machine."""

from __future__ import annotations

from importlib.metadata import version

from reinforce.shipping.machine import cpu_name, describe_machine, machine_name


def test_description_names_processor_cores_and_versions() -> None:
    about = describe_machine(["torch"])
    assert about["cpu"] == cpu_name() != ""
    assert about["cores"] >= 1
    assert about["versions"]["torch"] == version("torch")
    assert machine_name().startswith(f"{cpu_name()}, ")
