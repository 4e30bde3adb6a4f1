"""What a record says, and the file of records."""

import json

import pytest
import torch

from mixpool import records


def test_a_record_says_what_where_and_from_which_code(tmp_path):
    record = records.stamp("speed", case="stem", ms={"p50": 1.5})
    assert record["kind"] == "speed" and record["ms"] == {"p50": 1.5}
    assert record["machine"]["torch"] and record["code"]["version"] and record["time_utc"] and record["command"]
    assert {"gpu", "driver", "triton", "cuda", "cudnn"} <= record["machine"].keys()
    assert record["machine"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(record["code"]["source"]) == 16
    path = tmp_path / "deep" / "r.jsonl"
    records.write(path, [record, {"kind": "eval"}])
    assert list(records.read(path)) == [json.loads(json.dumps(record)), {"kind": "eval"}]
    assert [file.name for file in path.parent.iterdir()] == ["r.jsonl"]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match="line 2"):
        list(records.read(tmp_path / "r.jsonl"))


def test_the_commit_is_that_of_the_start(monkeypatch):
    """A measurement runs the code it has imported: what is committed or edited meanwhile must not be stamped on it."""
    before = records.stamp("speed")["code"]
    monkeypatch.setattr(records, "_commit", lambda folder: {"commit": "another", "dirty": True})
    assert records.stamp("speed")["code"] == before
