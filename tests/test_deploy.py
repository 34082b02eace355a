"""The alert rules and the dashboard: valid, and about series that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from checkpoints import tiny_llama_dir
from servers import running

from pronk.serve.config import ServeConfig

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"


def promtool(*args: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [tool, *args], cwd=ALERTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid():
    promtool("check", "rules", ALERTS.name)
    promtool("check", "config", "prometheus.yml")


def test_the_rules_raise_what_they_should():
    promtool("test", "rules", "alerts_test.yml")


def test_every_series_is_served(tmp_path):
    path = tiny_llama_dir(tmp_path / "tiny")
    with running({"tiny": path}, ServeConfig(port=0)) as server:
        body = {"model": "tiny", "prompt": "once", "max_tokens": 4}
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        text = httpx.get(f"{server.url}/metrics").text
    served = set(re.findall(r"^# TYPE (pronk:\w+)", text, re.MULTILINE))
    for name, kind in re.findall(r"^# TYPE (pronk:\w+) (\w+)", text, re.MULTILINE):
        if kind == "histogram":
            served.add(f"{name}_bucket")
    named = set(re.findall(r"pronk:\w+", ALERTS.read_text()))
    exprs = [
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    named |= set(re.findall(r"pronk:\w+", " ".join(exprs)))
    assert named and named <= served
