"""The table of evaluations side by side, from their records."""

from __future__ import annotations

from mixpool.evaluation.table import table_rows, table_text


def record_of(model, value, **fields):
    path = {"horizontal": {}, "vertical": {}, "diagonal": {}}
    steps = [str(k) for k in range(1, 9)]
    return {
        "model": model,
        "num_images": 10,
        "summary": {"top1": value, "flip_probability": {d: {k: value / int(k) for k in steps} for d in path}},
        "ci95": {
            "top1": [value - 1, value + 1],
            "flip_probability": {d: {k: [value - 2, value + 2] for k in steps} for d in path},
        },
        **fields,
    }


def test_the_table():
    difference = record_of("", 0.5)
    difference["ci95"]["top1"] = [0.25, 0.75]
    found = [record_of("a", 50.0), record_of("b", 50.5, difference_to="a", difference=difference)]
    rows = {row[0]: row[1:] for row in table_rows(found)}
    assert rows[""] == ["A", "B", "B - A"]
    assert rows["top-1 (%)"] == ["50.00 (49.00 to 51.00)", "50.50 (49.50 to 51.50)", "+0.50 (+0.25 to +0.75)*"]
    assert rows["flips, horizontal 2 px (%)"][2] == "+0.25 (-1.50 to +2.50)"
    assert len(rows) == 1 + 1 + 5
    lines = table_text(found).splitlines()
    assert lines[:3] == ["A  a", "B  b", ""] and len(lines) == 3 + 7
    assert len({len(line) for line in lines[3:]}) == 1


def test_the_table_of_models_that_were_measured_differently():
    other = record_of("b", 1.0)
    del other["summary"]["top1"], other["ci95"]["top1"]
    assert table_rows([record_of("a", 2.0), other])[1] == ["top-1 (%)", "2.00 (1.00 to 3.00)", "-"]
