"""The contracts that are looked for in another process, and what asks and answers there."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache

from pipeline.contracts.environment.suite import BOUNDS, Seen, Suite, parting, proceed
from pipeline.settings.params import Environment
from pipeline.workspace.processes import start_with_parent

PLOTTING = ("matplotlib", "pygame", "plotly", "seaborn", "bokeh")


def another_process(suite: Suite) -> Iterator[str]:
    """Equal seeds and actions give equal episodes in another process under another PYTHONHASHSEED."""
    child, environment = elsewhere(suite), suite.fresh()
    if "error" in child:
        yield f"nothing came back (is the environment registered on import of {suite.module}?): {child['error']}"
    for (seed, state, played), (openings, course) in zip(child["asked"], child["seen"], strict=True):
        here = [suite.opening(environment, seed, None), suite.opening(environment, seed, state)]
        if difference := parting(here, openings) or parting(proceed(environment, played), course):
            yield f"differs there: {difference}"


def imports(suite: Suite) -> Iterator[str]:
    """Making and playing the environment imports no plotting library."""
    loaded = elsewhere(suite).get("modules")
    suite.place = ""
    if loaded:
        yield f"importing {suite.module} imports {', '.join(loaded)}"


@lru_cache(maxsize=1)
def elsewhere(suite: Suite) -> Seen:
    """What another process under another PYTHONHASHSEED sees."""
    played = [[seed, state, suite.actions(seed, state)] for state, seed in suite.states()]
    asked = {"module": suite.module, "section": suite.section.model_dump(), "episodes": played}
    changed = {
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import answer; answer()"],
        input=json.dumps(asked),
        env=os.environ | changed,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=start_with_parent(signal.SIGKILL),
    )
    if done.returncode:
        return {"error": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]}
    seen: Seen = json.loads(done.stdout.splitlines()[-1])
    return seen | {"asked": played}


def answer() -> None:
    """In the other process: replay what standard input asks for, and print what was seen."""
    asked = json.load(sys.stdin)
    if asked["module"] != "__main__":
        importlib.import_module(asked["module"])
    suite = Suite(Environment(**asked["section"]), None, BOUNDS)
    environment, seen = suite.fresh(), []
    for seed, state, actions in asked["episodes"]:
        openings = [suite.opening(environment, seed, None), suite.opening(environment, seed, state)]
        seen.append([openings, proceed(environment, actions)])
    print(f"\n{json.dumps({'seen': seen, 'modules': [name for name in PLOTTING if name in sys.modules]})}")
