"""Pictures of the report and of MLflow's comparison for the documents, by a headless Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from pipeline.workspace.addresses import shown
from pipeline.workspace.errors import UserError, line_of

SIZE = {"width": 1280, "height": 860}
PATIENCE = 90.0
"""Seconds that MLflow's server may take to answer; it migrates an older database first."""
METRIC = "success"
"""What MLflow is asked to compare."""
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser: the machine's Chromium, else the one that playwright has installed.

    Raises:
        UserError: playwright or Chromium is not there.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        raise UserError("screenshots: playwright is not installed; pip install -e '.[dev]'") from None
    found = next(filter(None, map(shutil.which, NAMES)), None)
    # Chromium's sandbox refuses to run as root.
    arguments = ["--disable-gpu", *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=arguments)
        except Error as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"screenshots: no Chromium ({said}); install the package chromium, or `playwright install chromium`"
            ) from None
        with closing(browser):
            yield browser


def shoot_report(browser: Any, report: Path, results: Path, viewer: Path) -> None:
    """Write two PNGs: the first screen, and, if the report has any, a tree, or two episodes beside each other.

    Raises:
        UserError: there is no report.
    """
    if not report.exists():
        raise UserError(f"{report}: no such file; `make repro` makes it")
    with _page(browser, offline=True) as page:
        page.goto(report.resolve().as_uri())
        page.locator("figure.chart .main-svg").first.wait_for()  # charts are drawn when they come into view
        page.wait_for_timeout(500)
        page.screenshot(path=results)
        if page.locator("#viewer").count():
            trees = page.locator("#viewer svg")
            if trees.count():
                page.locator("#viewer select").first.evaluate("(control) => control.scrollIntoView()")
            else:
                page.locator("#viewer-beside").click()
                page.locator("#trajectories").evaluate("(heading) => heading.scrollIntoView()")
                page.locator("#viewer .tokens .token.action").first.hover()
            page.screenshot(path=viewer)


def shoot_mlflow(browser: Any, uri: str, experiment: str, runs: Sequence[str], target: Path) -> None:
    """Write MLflow's comparison of some runs of an experiment: one metric of theirs over the iterations.

    For the store ``uri`` a server is started and stopped, unless it is one. ``runs`` are ids, the target is a PNG.

    Raises:
        UserError: the server does not start, or does not know the experiment.
    """
    with _server(uri) as address, _page(browser) as page:
        try:
            asked = urlencode({"experiment_name": experiment})
            with urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?{asked}", timeout=PATIENCE) as answer:
                number = json.load(answer)["experiment"]["experiment_id"]
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(
                f"screenshots: {shown(address)}: no experiment {experiment!r} ({line_of(error, address)})"
            ) from None
        chosen = {"runs": list(runs), "experiments": [number], "metric": METRIC, "plot_metric_keys": [METRIC]}
        page.goto(f"{address}/#/metric?{urlencode({key: json.dumps(value) for key, value in chosen.items()})}")
        page.locator("svg.main-svg").first.wait_for(timeout=PATIENCE * 1000)
        page.locator('input[type="radio"][value="step"]').check(force=True)
        assistant = page.get_by_label("Close")
        if assistant.count():
            assistant.first.click()
        page.wait_for_timeout(2000)
        page.screenshot(path=target)


@contextmanager
def _page(browser: Any, offline: bool = False) -> Iterator[Any]:
    look = {"viewport": SIZE, "color_scheme": "light", "reduced_motion": "reduce"}
    with closing(browser.new_context(**look, offline=offline)) as context:
        yield context.new_page()


SERVED = '{ "$@" < /dev/null; kill 0; } & read -r _; kill 0'
"""Runs a server, all of whose processes end with it, and when nobody holds the other end of standard input any more: that
is so, too, when the stage has been killed."""


@contextmanager
def _server(uri: str) -> Iterator[str]:
    """Address of an MLflow server on this machine, for as long as it is needed."""
    if uri.startswith(("http://", "https://")):
        yield uri.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        ["sh", "-c", SERVED, "sh", *command],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        # Not among its arguments, which all users of a machine can see.
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_BACKEND_STORE_URI": uri},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(server, address)
        yield address
    finally:
        server.communicate()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"screenshots: `mlflow ui` has not answered on {address}")
