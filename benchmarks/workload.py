"""Prints what ``make repro`` computes, and a hash of it: timings of two checkouts compare only if these agree.

python -m benchmarks.workload --params params.yaml
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from pipeline.settings.params import Config, load

COMPUTED = ("seeds", "environments", "policy", "rollout", "bottleneck", "train", "methods", "evaluation", "compare")


def workload(config: Config) -> str:
    """One line: the hash of all resolved settings that decide what is computed, and its size."""
    resolved = {name: value for name, value in config.model_dump(mode="json").items() if name in COMPUTED}
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:16]
    episodes = config.rollout.groups * config.rollout.group_size
    return (
        f"workload {digest}: {len(config.environments)} environments x {len(config.methods)} methods x "
        f"{len(config.seeds)} seeds x {config.train.iterations} iterations of {episodes} episodes"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    print(workload(load(parser.parse_args().params)))
