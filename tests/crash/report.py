# SPDX-License-Identifier: Apache-2.0
"""Figures of a long run, for whoever reads along."""

from __future__ import annotations

import pytest


def say(request: pytest.FixtureRequest, *lines: str) -> None:
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            for line in lines:
                reporter.write_line(line)
