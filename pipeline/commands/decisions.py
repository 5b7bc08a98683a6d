"""Which signal finds the decision points? Branches at the tokens that it ranks highest, and the variance they explain."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.command import configured, out_folder, run


def main() -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    parser.add_argument("--environment", help="default: all")
    parser.add_argument(
        "--method", help="one iteration of it moves the policy (default: the first that does not branch)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[300, 301, 302, 303], help="default: 300 301 302 303")
    parser.add_argument("--positions", type=int, default=4, help="tokens per signal and initial state (default: 4)")
    parser.add_argument("--candidates", type=int, default=4, help="sampled in place of each (default: 4)")
    parser.add_argument("--continuations", type=int, default=4, help="of each candidate (default: 4)")
    arguments = parser.parse_args()
    config = configured(arguments)
    import transformers.models.auto.modeling_auto  # noqa: F401  (imported before the processes fork)

    from pipeline.analysis.decisions import SampleSizes, decisions
    from pipeline.progress.display import doing
    from pipeline.report.decision_figures import decisions_text, draw_decisions
    from pipeline.workspace.files import write_json, write_text

    environments = [arguments.environment] if arguments.environment else list(config.environments)
    usable = [name for name, method in config.methods.items() if method.branching.kind == "none"]
    method = arguments.method or next(iter([*usable, *config.methods]))
    sizes = SampleSizes(arguments.seeds, arguments.positions, arguments.candidates, arguments.continuations)
    out, texts = out_folder(config), []
    for name in environments:
        result = decisions(config, out / "models" / "policy", name, method, sizes, Path(".cache"))
        doing(f"{name}: drawing")
        folder = out / "reports" / "decisions" / name
        folder.mkdir(parents=True, exist_ok=True)
        texts.append(decisions_text(result))
        write_json(folder / "decisions.json", result)
        write_text(folder / "decisions.txt", texts[-1])
        draw_decisions(result, folder / "decisions")
    return "\n".join(texts) + f"\n{folder.parent}: decisions.json, .txt, .png per environment. Next: open the figure"


if __name__ == "__main__":
    run(main)
