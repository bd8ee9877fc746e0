"""What a benchmark's JSON says of the machine: what matters to a time, and no host's name."""

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["node"] = ""
    machine_info.get("cpu", {}).pop("hz_actual_friendly", None)
