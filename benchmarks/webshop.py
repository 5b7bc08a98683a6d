"""WebShop with very many products: ``python -m benchmarks.webshop`` writes files in the release's format, loads and searches.

Loading runs twice in processes of their own, without the search's index and with it, since memory's peak is a process's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.environments.webshop.generated import generate

LOAD = """
import resource, sys, time
from pipeline.environments.webshop.catalogue import load
folder, begun = sys.argv[1], time.perf_counter()
shop = load(f"{folder}/products.json", f"{folder}/attributes.json", None, 1, f"{folder}/index")
loaded, times = time.perf_counter() - begun, []
for goal in shop.goals[:100]:
    begun = time.perf_counter()
    shop.find(goal.instruction)
    times.append(1000 * (time.perf_counter() - begun))
times.sort()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{len(shop.products)} products in {loaded:.1f} s, peak {peak:.2f} GiB; "
      f"a search: median {times[len(times) // 2]:.1f} ms, longest of {len(times)} {times[-1]:.1f} ms")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=2500, help="of a product's description, which many share")
    arguments = parser.parse_args()
    products, attributes = generate(arguments.products, 0)
    draws = np.random.default_rng(0)
    vocabulary = [f"word{number}" for number in range(20_000)]
    common = 1 / np.arange(1, len(vocabulary) + 1)
    with tempfile.TemporaryDirectory() as folder:
        for record in products:
            drawn = draws.choice(len(vocabulary), arguments.characters // 8, p=common / common.sum())
            record["full_description"] += " ".join(vocabulary[i] for i in drawn)[: arguments.characters]
        for name, value in (("products", products), ("attributes", attributes)):
            (Path(folder) / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        size = (Path(folder) / "products.json").stat().st_size
        print(f"{size / 1e6:.0f} MB of products")
        for state in ("without an index", "with the index kept"):
            print(f"{state}: ", end="", flush=True)
            subprocess.run([sys.executable, "-c", LOAD, folder], check=True)


if __name__ == "__main__":
    main()
