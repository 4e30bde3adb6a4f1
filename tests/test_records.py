"""What a record says, and the file of records."""

import json
import subprocess
import sys

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


@pytest.fixture
def first_call():
    """As in a process that has not asked for its code yet."""
    records.code.cache_clear()
    yield
    records.code.cache_clear()


def test_the_commit_is_that_of_the_start(first_call, monkeypatch):
    """A measurement runs the code it has imported: what is committed or edited meanwhile must not be stamped on it."""
    before = dict(records.code())
    monkeypatch.setattr(records, "_commit", lambda folder: {"commit": "another", "dirty": True})
    monkeypatch.setattr(records, "_source_hash_of", lambda folder: "another")
    assert records.stamp("speed")["code"] == before
    records.code.cache_clear()
    assert records.stamp("speed")["code"]["source"] == "another", "the test can fail"


def test_a_record_does_not_share_its_code_with_the_next():
    records.stamp("speed")["code"]["commit"] = "mine"
    assert records.stamp("speed")["code"]["commit"] != "mine"


def test_the_import_asks_neither_git_nor_the_sources():
    script = (
        "import pathlib, subprocess; asked = []; read = pathlib.Path.read_bytes\n"
        "subprocess.run = lambda command, **_: (asked.append(command[0]), 1 / 0)\n"
        "pathlib.Path.read_bytes = lambda path: (asked.append(path.suffix), read(path))[1]\n"
        "from mixpool import records; print(asked)\n"
        "try: records.code()\n"
        "except ZeroDivisionError: print(asked[-1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "git"], "the second line shows that the first could have been another"
