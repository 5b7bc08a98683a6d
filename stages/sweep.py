"""SearchRun settings: run a study of params.yaml's ``sweep`` section, or go on with one; reports/sweep/<study>."""

from pathlib import Path

from pipeline.commands.cli import ParamsFile, StudyName, configured, make_alone, run


def main(study: StudyName, params: ParamsFile = "params.yaml") -> str:
    config, layout, params = configured(params)
    from pipeline.progress.display import doing
    from pipeline.sweep.figures import write_figures
    from pipeline.sweep.plan import plans
    from pipeline.sweep.result import SearchResult, best_overlay, report_text, summary, trials_table
    from pipeline.sweep.tracking import log_search, observer
    from pipeline.sweep.trial import TrainingObjective
    from pipeline.sweep.workers import SearchRun, run_search
    from pipeline.tracking.store import open_store, store_of
    from pipeline.workspace.errors import UserError
    from pipeline.workspace.files import write_record, write_text
    from pipeline.workspace.processes import in_own_process

    root = Path(".")
    target, policy = layout.sweep(study), layout.policy
    if not (policy / "config.json").exists():
        raise UserError(f"{policy}: no policy there; `make sweep` makes it first, as does python -m stages.policy")
    found = []
    for plan in plans(params, study, policy):
        in_own_process(open_store, store_of(config, root), plan.environment)
        search = SearchRun(plan, TrainingObjective(plan), observer(plan, root))
        found.append(SearchResult(plan, run_search(search, config.trainings, config.threads)))
    make_alone(layout, f"sweep {study}")  # many may search, on machines that share this folder
    doing("drawing figures")
    write_text(target / "trials.csv", trials_table(found).to_csv(index=False))
    write_text(target / "best.yaml", best_overlay(found))
    write_record(target / "summary.json", {"schema": 1, "study": study, "searches": list(map(summary, found))})
    write_text(target / "sweep.txt", report_text(found))
    write_figures(found, target)
    doing("logging to MLflow")
    for search_found in found:
        log_search(search_found, root, target)
    return f"{target}: sweep.txt, trials.csv, best.yaml, figures. Next: make sweep-confirm STUDY={study}"


if __name__ == "__main__":
    run(main)
