"""A plugin of pytest that bench/test_step.py loads: a benchmark's JSON names no host."""

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["node"] = ""
