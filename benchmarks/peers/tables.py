"""The tables of mixpool beside other packages' anti-aliased pooling, from the records of `benchmarks.peers`."""

from __future__ import annotations

from benchmarks.kit.markdown import machine_line, read, table
from benchmarks.kit.store import RECORDS
from mixpool.evaluation.shifts import DIRECTIONS

# The tables, by the names that pages call them.
__all__ = [
    "peers_functions",
    "peers_cost",
    "peers_stability",
    "peers_network",
]

NOT_RUN = "Not run yet."
SAME = 1e-9  # of the outputs' std, in float64: below, two modules are the same function


def peers_functions() -> str:
    """Largest difference to mixpool's BlurPool stem and to timm's ResNet-18 with BlurPool, the weights being equal."""
    found = _read("peer_function")
    rows = []
    for record in found:
        cells = [record["case"], _name(record), record["base"]]
        if "result" in record:
            result = record["result"]
            shown = [_size(result.get(key)) for key in ("evaluation", "inside", "training", "gradient")]
            rows.append([*cells, _verdict(result), *shown])
        else:
            rows.append(_skipped(record, cells, 5))
    quantities = ["evaluation", "evaluation, inside", "training", "gradient"]
    return _with_line(table(["case", "what", "compared with", "the same?", *quantities], rows), found)


def peers_cost() -> str:
    """Times over stock's, forward and with the backward pass, of stems and of whole ResNet-18s."""
    found = _read("peer_speed")
    rows = []
    for record in (r for r in found if r["mode"] == "forward"):
        cells = [record["case"], _name(record)]
        key = (record["case"], record["provider"])
        full = next((r for r in found if r["mode"] == "full" and (r["case"], r["provider"]) == key), {})
        if "ms" in record:
            rows.append([*cells, *_times(record), *_times(full)])
        else:
            rows.append(_skipped(record, cells, 4))
    header = ["case", "what", "forward ms", "forward, times stock", "forward + backward ms", "times stock"]
    return _with_line(table(header, rows), found)


def peers_stability() -> str:
    """Change of the stem's output under shifts; horizontal / vertical / diagonal."""
    found = _read("peer_stability")
    shifts = next((list(r["result"]["all"][next(iter(DIRECTIONS))]) for r in found if "result" in r), [])
    rows = []
    for record in found:
        if "result" not in record:
            rows.append(_skipped(record, [record["case"], _name(record)], 2 * len(shifts)))
            continue
        cells = [f"{record['case']}, {record['num_images']}", _name(record)]
        for channels in ("all", "swapped"):
            of = record["result"][channels]
            cells += [" / ".join(f"{of[way][shift]:.3f}" for way in DIRECTIONS) for shift in shifts]
        rows.append(cells)
    columns = [f"{channels} channels, {shift} px" for channels in ("all", "swapped") for shift in shifts]
    return _with_line(table(["photos", "pooling", *columns], rows), found)


def peers_network() -> str:
    """SqueezeNet under each pooling, without training: numbers and paired differences to stock."""
    found = _read("peer_network")
    paths = [("top1",), ("shift_consistency",)]
    paths += [("flip_probability", way, k) for way, k in (("horizontal", "1"), ("horizontal", "4"), ("diagonal", "1"))]
    rows = []
    for record in found:
        if "result" not in record:
            rows.append(_skipped(record, [_name(record)], 1 + len(paths)))
            continue
        result = record["result"]
        values = [f"{_at(result['summary'], path):.1f}" for path in paths]
        if record["provider"] != "stock":
            values = [f"{value} ({_paired(result, path)})" for value, path in zip(values, paths, strict=True)]
        rows.append([_name(record), str(result["num_modulus"]), *values])
    names = ["top-1 %", "consistency %", *(f"flips % {path[2]} px {path[1]}" for path in paths[2:])]
    return _with_line(table(["pooling of the stem", "modulus channels", *names], rows), found)


def _read(kind: str) -> list[dict]:
    found = read("peers", RECORDS) if (RECORDS / "peers.jsonl").exists() else []
    return [record for record in found if record["kind"] == kind]


def _with_line(text: str, found: list[dict]) -> str:
    return f"{text}\n\n{machine_line(found[0])}" if found else NOT_RUN


def _name(record: dict) -> str:
    version = record["package_version"]
    return record["provider"] if version is None else f"{record['provider']} ({version})"


def _skipped(record: dict, cells: list[str], missing: int) -> list[str]:
    return [*cells, record["skipped"], *["-"] * (missing - 1)]


def _size(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def _verdict(result: dict) -> str:
    if max(result[key] for key in ("evaluation", "training", "gradient")) < SAME:
        return "yes"
    return "but for the border" if result.get("inside", 1) < SAME else "no"


def _times(record: dict) -> list[str]:
    if "ms" not in record:
        return ["-", "-"]
    ratio = record["ratio_to_stock"]
    return [f"{record['ms']['p50']:.1f}", f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"]


def _at(values, path: tuple[str, ...]):
    for name in path:
        values = values[name]
    return values


def _paired(result: dict, path: tuple[str, ...]) -> str:
    low, high = _at(result["difference"]["ci95"], path)
    return f"{_at(result['difference']['summary'], path):+.1f}, {low:+.1f} to {high:+.1f}"
