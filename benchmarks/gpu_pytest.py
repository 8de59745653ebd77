"""A pytest plugin: report each test as a case of the GPU kit (see `gpu_rows`)."""

from __future__ import annotations

import os
from typing import Any

import pytest
from gpu_rows import START_AGAIN, device_is_broken, first_case, write


class Reporter:
    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.row: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.numbers = {item.nodeid: number for number, item in enumerate(items)}
        write(cases=len(items))
        del items[: first_case()]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.row = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        write(start=self.numbers[nodeid], test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 2)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(report.longrepr) if crash is None else crash.message
            self.row |= {"outcome": "failed", "error": message[:500]}
        elif report.skipped and self.row["outcome"] == "passed":
            reason: Any = report.longrepr
            expected = hasattr(report, "wasxfail")
            text = report.wasxfail if expected else reason[2].removeprefix("Skipped: ")
            self.row |= {"outcome": "skipped", "reason": text}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        write(done=self.numbers[nodeid], **self.row)
        if self.row["outcome"] == "failed" and device_is_broken():
            os._exit(START_AGAIN)  # no test of this process can pass any more


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(), "gpu-kit")
