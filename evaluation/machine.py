"""What a number depends on: the machine, the versions and the date."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def describe_machine(*libraries: str) -> dict[str, str]:
    """Return date, machine, GPU (where there is one), Python and the versions of torch, this pack and `libraries`."""
    described = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    for library in ("safety-experts", "torch", *libraries):
        try:
            described[library] = version(library)
        except PackageNotFoundError:  # run from its folder, without being installed
            described[library] = "not installed"
    return described
