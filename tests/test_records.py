"""Records and the tables that are made from them."""

import json

import pytest

from benchmarks import tables
from mixpool import records


def test_a_record_says_what_where_and_from_which_code(tmp_path):
    record = records.stamp("speed", case="stem", ms={"p50": 1.5})
    assert record["kind"] == "speed" and record["ms"] == {"p50": 1.5}
    assert record["machine"]["torch"] and record["code"]["version"] and record["time_utc"] and record["command"]
    path = tmp_path / "deep" / "r.jsonl"
    records.write(path, [record, {"kind": "eval"}])
    assert list(records.read(path)) == [json.loads(json.dumps(record)), {"kind": "eval"}]
    assert [file.name for file in path.parent.iterdir()] == ["r.jsonl"]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match="line 2"):
        list(records.read(tmp_path / "r.jsonl"))


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_tables_are_up_to_date(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run python -m benchmarks.tables"
    assert "table:" in text


def test_a_stale_table_is_noticed():
    text = tables.PAGES[0].read_text()
    assert tables.filled(text.replace("| stock |", "| stack |")) == text


def test_the_commit_is_that_of_the_start(monkeypatch):
    """A measurement runs the code it has imported: what is committed or edited meanwhile must not be stamped on it."""
    before = records.stamp("speed")["code"]
    monkeypatch.setattr(records, "_commit", lambda folder: {"commit": "another", "dirty": True})
    assert records.stamp("speed")["code"] == before
