"""What a comparison reads: numbers that are none are refused with their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.analysis.comparison import Inputs, read_inputs
from pipeline.settings.params import Config
from pipeline.workspace.errors import UserError
from pipeline.workspace.files import write_json
from pipeline.workspace.layout import Layout
from tests.comparison_cases import configuration, inputs


@pytest.fixture
def written(tmp_path: Path) -> tuple[Config, Inputs, Layout]:
    """A comparison's inputs as the stages leave them."""
    config, layout = configuration(), Layout(tmp_path)
    made = inputs(config)
    for key, table in made.episodes.items():
        layout.evaluations(*key).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, layout.evaluations(*key))
    for key, curves in made.curves.items():
        write_json(layout.curves(*key), {"seeds": curves})
    return config, made, layout


def spoil_evaluation(made: Inputs, layout: Layout) -> str:
    table = made.episodes["lake", "grpo"]
    returns = [*table["return"].to_pylist()[:1], float("inf"), *table["return"].to_pylist()[2:]]
    file = layout.evaluations("lake", "grpo")
    pq.write_table(table.set_column(table.schema.get_field_index("return"), "return", pa.array(returns)), file)
    return f"{file}: column return is inf at row 1 (seed 0, episode 1 of state state 0); `dvc repro` makes it again"


def spoil_curve(made: Inputs, layout: Layout) -> str:
    file = layout.curves("lake", "grpo")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"non_finite_losses": 0.0', '"non_finite_losses": NaN', 1), encoding="utf-8")
    return f"{file}: cannot be read: NaN is no number of JSON's"


@pytest.mark.parametrize("spoil", [spoil_evaluation, spoil_curve])
def test_a_number_that_is_none_is_refused_with_its_place(
    written: tuple[Config, Inputs, Layout], spoil: Callable[[Inputs, Layout], str]
) -> None:
    config, made, layout = written
    assert read_inputs(config, layout).curves == made.curves
    said = spoil(made, layout)
    with pytest.raises(UserError) as error:
        read_inputs(config, layout)
    assert str(error.value).startswith(said)
