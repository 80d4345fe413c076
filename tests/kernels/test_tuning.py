"""Configuration tables: read once, an entry over the heuristic, wrong entries named."""

import json

import pytest

from qat_kernels import tuning


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def test_without_a_table_the_heuristic_decides(tables):
    assert tuning.configuration("w4a16", "n=1", (9, 0), {"splits": 2}) == {"splits": 2}


def test_an_entry_sets_some_fields(tables):
    entry = {"operations": {"w4a16": {"n=1": {"splits": 4}}}}
    (tables / "sm_90.json").write_text(json.dumps(entry))
    heuristic = {"splits": 2, "num_warps": 2}
    found = tuning.configuration("w4a16", "n=1", (9, 0), heuristic)
    assert found == {"splits": 4, "num_warps": 2}
    assert tuning.configuration("w4a16", "n=2", (9, 0), heuristic) == heuristic
    assert tuning.configuration("w4a16", "n=1", (8, 0), heuristic) == heuristic


def test_unknown_fields_and_broken_files_are_named(tables):
    entry = {"operations": {"w4a16": {"n=1": {"stages": 4}}}}
    (tables / "sm_90.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"sm_90.json: n=1 sets \{'stages'\}"):
        tuning.configuration("w4a16", "n=1", (9, 0), {"splits": 2})
    for broken in ("{", "[]", "{}", '{"operations": 3}', '{"operations": [1]}'):
        (tables / "sm_80.json").write_text(broken)
        with pytest.raises(ValueError, match=r"sm_80\.json: no table"):
            tuning.table((8, 0))


def test_the_tables_that_are_checked_in_can_be_read():
    for path in tuning.TABLES.glob("sm_*.json"):
        digits = path.stem.removeprefix("sm_")
        assert tuning.table((int(digits[:-1]), int(digits[-1])))
