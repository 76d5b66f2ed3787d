"""Columns of new data for a run: those of its training, unless flags name others."""

from __future__ import annotations

from types import SimpleNamespace

from small import write

from loracle.config import RunConfig
from loracle.data.sources import open_table
from loracle.runs.columns import columns_of_run

ROLES = ("clicked", "clicks", "impressions", "compare_within", "weight", "date")


def test_sums_and_single_impressions_replace_each_other(tmp_path):
    def roles(info, columns, **flags):
        table = open_table(str(write(tmp_path / "log.csv", [dict.fromkeys(columns.split(), 1)])))
        result = columns_of_run(info, table, flags)
        return {name for name in ROLES if getattr(result, name)}

    def trained(columns):
        config = RunConfig.from_flat({"group": "test", "compare_within": "image", "weight": "w", "date": "day"})
        return SimpleNamespace(config=config, provenance={"columns": columns})

    single, sums = trained({"clicked": "clicked"}), trained({"clicks": "clicks", "impressions": "shown"})
    assert roles(single, "test image clicked w day") == {"clicked", "compare_within"}
    assert roles(single, "test clicks shown") == set()
    assert roles(single, "test clicked clicks shown", clicks="clicks") == {"clicks"}
    assert roles(sums, "test image,too clicks shown") == {"clicks", "impressions"}
    assert roles(sums, "test image clicks shown clicked", clicked="clicked") == {"clicked", "compare_within"}
