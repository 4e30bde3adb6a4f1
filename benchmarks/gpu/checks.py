"""Is the fused path right on this GPU? Tests, memory checker, repeatability, errors against float64, odd images.

`python -m benchmarks.gpu.checks` is the small case that compute-sanitizer watches: one fused forward and backward.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Case, shrunk
from benchmarks.gpu.providers import autocast_of, why
from benchmarks.kit import timing
from benchmarks.kit.stems import ALEXNET, CMOD, MAX, MIX, MODULUS, RESNET, Unavailable, images, mixpool_stem
from benchmarks.kit.store import NOT_RUN, ROOT, Store
from benchmarks.kit.timing import Budget, DeviceLost, release
from mixpool import records

PYTEST_SECONDS = 180.0
SANITIZER_SECONDS = 150.0
# One rounding of the output's dtype; tf32 keeps 10 bits of the factors.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-11, "autocast": 2.0**-8}


def run_checks(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """All checks; the tests' own verdict first."""

    def todo(check: str) -> bool:
        return again or not store.has(check_record(check, dry=dry))

    fused, others = test_files()
    for check, files in {"tests": fused, "other tests": others}.items():
        if todo(check):
            seconds = min(PYTEST_SECONDS, budget.left - 30)
            fields = run_tests(check, files, store.path.parent / "tests.log", seconds, dry=dry)
            store.add(check_record(check, dry=dry, **fields))
    if todo("ceilings"):
        found = ceilings(device, dry=dry)
        store.add(
            check_record("ceilings", dry=dry, status=", ".join(f"{n} {v:.0f}" for n, v in found.items()), **found)
        )
    for case in accuracy_cases(quick=quick, dry=dry):
        blank = case.record("fused", "accuracy", dry=dry)
        if not again and store.has(blank):
            continue
        release()
        if not budget.allows(5):
            store.add(case.record("fused", "accuracy", dry=dry, skipped=NOT_RUN + "out of budget"))
            continue
        try:
            with budget.spending(5):
                fields = accuracy(case, device)
        except Unavailable as error:
            fields = {"skipped": str(error)}
        except DeviceLost as error:
            store.add(case.record("fused", "accuracy", dry=dry, skipped=timing.reason_of(error)))
            raise
        store.add(case.record("fused", "accuracy", dry=dry, **fields))
        print(f"accuracy: {case}: {fields.get('skipped') or verdict(fields)}", flush=True)
    if todo("memcheck"):
        store.add(check_record("memcheck", dry=dry, **run_sanitizer(min(SANITIZER_SECONDS, budget.left), dry=dry)))


def check_record(check: str, *, dry: bool = False, **fields: Any) -> dict:
    return records.stamp("check", check=check, **({"dry": True} if dry else {}), **fields)


def verdict(fields: dict[str, Any]) -> str:
    """One line of an accuracy record."""
    worst = max(fields["error"].values(), key=lambda error: error["rms_ratio_vs_eager"])
    odd = [f"{name} {found}" for name, found in fields["odd_images"].items() if found != "passed"]
    repeatable = "bitwise repeatable" if fields["bitwise_repeatable"] else f"NOT REPEATABLE: {fields['differs']}"
    return (
        f"{'within' if fields['within'] else 'NOT WITHIN'} the criterion, "
        f"worst rms error {worst['rms_ratio_vs_eager']:.2f} x eager's; "
        f"{repeatable}; odd images: {', '.join(odd) or 'passed'}"
    )


# --- pytest and compute-sanitizer -------------------------------------------------------------------------------------


def test_files() -> tuple[list[str], list[str]]:
    """The fused path's own test files, and other files that hold tests for a GPU."""
    fused, others = [], []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.name.startswith("test_fused"):
            fused.append(name)
        elif re.search(r"mark\.gpu\b", path.read_text()):
            others.append(name)
    return fused, others


def run_tests(check: str, files: list[str], log: Path, seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Counts and names of failures: of the fused path's files all tests, of others those for a GPU."""
    if dry:
        return {"skipped": "dry run, without pytest"}
    if not files:
        return {"skipped": NOT_RUN + "there is no such test file"}
    if seconds < 10:
        return {"skipped": NOT_RUN + "out of budget"}
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    # Other versions than those of constraints.txt may warn of other things.
    command += ["-p", "no:benchmark", "-W", "default"]
    if check != "tests":
        command += ["-m", "gpu"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(log, "a") as out:
        report = Path(folder) / "report.xml"
        print(f"{check}: {' '.join([*command[2:], *files])}", flush=True)
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", *files], cwd=ROOT, stdout=out, stderr=out, timeout=seconds
            )
            # 5: nothing was collected
            status = "passed" if done.returncode in (0, 5) else "failed"
        except subprocess.TimeoutExpired:
            status = "cut"
        counts, failed = read_report(report)
    ran = counts["tests"] - counts["skipped"]
    status = "none ran" if status == "passed" and ran == 0 else status
    print(f"{check}: {status}, {ran} ran, {len(failed)} failed {failed[:10]}; see {log.name}", flush=True)
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "ran": ran, "counts": counts, "failed": failed[:50], "seconds": seconds}


def read_report(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts and names of the failures of a JUnit file; zeros if pytest did not get to write it."""
    counts, failed = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}, []
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
            for test in suite.iter("testcase"):
                if test.find("failure") is not None or test.find("error") is not None:
                    failed.append(f"{test.get('classname')}::{test.get('name')}")
    return counts, failed


def run_sanitizer(seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """compute-sanitizer's memcheck over `small_case`; without the checker in a dry run."""
    if dry:
        reason = timing.attempt(lambda: small_case("cpu"), "cpu")
        return {"skipped": f"dry run, without compute-sanitizer: {reason or 'the case ran'}"}
    binary = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if binary is None:
        return {"skipped": "compute-sanitizer is not installed"}
    if seconds < 30:
        return {"skipped": NOT_RUN + "out of budget"}
    command = [binary, "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu.checks"]
    exact = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor has bounds of its own
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=exact)
    except subprocess.TimeoutExpired:
        return {"skipped": f"memcheck took more than {seconds:.0f} s"}
    said = done.stdout + done.stderr
    summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "small case" in line]
    if "no fused path" in said:
        status = {"skipped": summary[0] if summary else said[-300:]}
    else:
        passed = done.returncode == 0 and "small case ran" in said
        status = {"status": "passed" if passed else "failed", "said": summary or said[-1000:].splitlines()}
    print(f"memcheck: {status}", flush=True)
    return status


def small_case(device: str = "cuda") -> None:
    """One fused forward and backward of a mix and of CMod, odd sizes, batch statistics."""
    shape = RESNET._replace(size=37, out_channels=16)
    dtype, plans = "bfloat16", (MIX, CMOD)
    if device == "cpu":  # in Triton's interpreter, slowly
        shape, dtype, plans = RESNET._replace(size=19, out_channels=8), "tf32", (CMOD,)
    for plan in plans:
        stem = mixpool_stem(shape, plan, "fused", dtype=dtype, device=device, layout="channels_last").train()
        out = stem(images(shape, 2, dtype, device, "channels_last"))
        torch.autograd.grad(out, list(stem.parameters()), torch.randn_like(out))
        stem.eval()
        with torch.inference_mode():
            stem(images(shape, 2, dtype, device, "NCHW"))
    timing.synchronize(device)


def ceilings(device: str, *, dry: bool = False) -> dict[str, float]:
    """What this GPU reaches: a large copy (bytes read and written) and a large bfloat16 product of random matrices."""
    numbers, side = (2**20, 128) if dry else (2**31, 8192)
    source = torch.empty(numbers, dtype=torch.int8, device=device).random_(-8, 8)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    ms = {name: timing.milliseconds(s)["p50"] for name, s in timing.interleave(calls, 3, 3, device).items()}
    return {
        "copy_gb_per_s": round(2 * numbers / ms["copy"] / 1e6, 1),
        "matmul_tflop_per_s": round(2 * side**3 / ms["product"] / 1e9, 1),
    }


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_cases(*, quick: bool = False, dry: bool = False) -> list[Case]:
    """One training step each: every kind of plan in every dtype, on a small batch."""
    dtypes = ("bfloat16", "float16", "tf32", "autocast")
    plans = (MIX, MAX, CMOD, MODULUS)
    found = [Case(RESNET, plan, 4, "full", dtype) for dtype in dtypes for plan in plans]
    found += [Case(RESNET, MIX, 4, "full", "bfloat16", "NCHW"), Case(ALEXNET, MIX, 4, "full")]
    if dry:
        return [shrunk(Case(RESNET, CMOD, 4, "full", "tf32"))]
    return found[:8] if quick else found


def accuracy(case: Case, device: str) -> dict[str, Any]:
    """Errors of one training step, fused and eager, against float64; two runs' bits; images that break things."""
    where = {"dtype": case.dtype, "device": device, "layout": case.layout}
    fused = mixpool_stem(case.shape, case.plan, "fused", **where).train()
    eager = mixpool_stem(case.shape, case.plan, "reference", **where).train()
    truth = copy.deepcopy(eager).double()
    x = images(case.shape, case.batch, case.dtype, device, case.layout)
    steps: list[dict[str, Tensor]] = []
    state = copy.deepcopy(fused.state_dict())

    def twice() -> None:
        for _ in range(2):
            fused.load_state_dict(state)
            steps.append(step(case, fused, x, device))

    reason = timing.attempt(twice, device)
    if reason is not None:
        raise Unavailable(why(fused, x, reason))
    differs = [name for name in steps[0] if not torch.equal(steps[0][name], steps[1][name])]
    found = {"fused": steps[0], "eager": step(case, eager, x, device)}
    # float64 reads the same numbers: the images and weights as the dtype has rounded them.
    rounded = (lambda t: t.bfloat16()) if case.dtype == "autocast" else (lambda t: t)
    with torch.no_grad():
        truth.weight.copy_(rounded(eager.weight))
    expected = step(case._replace(dtype="float64"), truth, rounded(x).double(), device)
    error = {
        name: errors(found["fused"][name], found["eager"][name], expected[name], ROUNDING[case.dtype])
        for name in expected
    }
    odd = odd_images(case, fused, eager, x, device)
    return {
        "error": error,
        "within": all(e["within"] for e in error.values()),
        "bitwise_repeatable": not differs,
        "differs": differs,
        "odd_images": odd,
    }


def step(case: Case, stem: nn.Module, x: Tensor, device: str) -> dict[str, Tensor]:
    """Output and all gradients of one training step from a random upstream gradient, the same in every dtype."""
    with autocast_of(case, device):
        out = stem(x)
    generator = torch.Generator(device).manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, device=device).bfloat16().to(out.dtype)
    names, parameters = zip(*stem.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, parameters, upstream)
    return {"out": out.detach(), **{f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}}


def errors(fused: Tensor, eager: Tensor, truth: Tensor, rounding: float) -> dict[str, Any]:
    """Largest and rms errors; within if at most twice eager's plus one rounding of the largest value (fused.md)."""
    scale = truth.abs().max().item()
    (max_fused, rms_fused), (max_eager, rms_eager) = (
        ((t.double() - truth).abs().max().item(), (t.double() - truth).square().mean().sqrt().item())
        for t in (fused, eager)
    )
    return {
        "max_abs": max_fused,
        "max_abs_eager": max_eager,
        "rms": rms_fused,
        "rms_eager": rms_eager,
        "rms_ratio_vs_eager": rms_fused / max(rms_eager, 1e-300),
        "largest": scale,
        # written so that NaN is not within
        "within": bool(max_fused <= 2 * max_eager + rounding * scale and rms_fused <= 2 * rms_eager + rounding * scale),
    }


def odd_images(case: Case, fused: nn.Module, eager: nn.Module, x: Tensor, device: str) -> dict[str, str]:
    """Black images in training, and one NaN or infinite pixel in evaluation: "passed", or what is wrong.

    Values are hidden where the reference's output is not finite and the fused one is, and spread the other way round.
    """
    found = {}

    def check(name: str, call) -> None:
        problems: list[str] = []
        reason = timing.attempt(lambda: problems.extend(call()), device)
        found[name] = reason or "; ".join(problems) or "passed"

    def black() -> list[str]:
        both = [step(case, stem.train(), torch.zeros_like(x), device) for stem in (fused, eager)]
        return [
            f"{name} is not finite"
            for name in both[0]
            if both[1][name].isfinite().all() and not both[0][name].isfinite().all()
        ]

    def pixel(value: float) -> list[str]:
        image = x.clone()
        image[0, 0, case.shape.size // 2, case.shape.size // 2] = value
        with torch.inference_mode(), autocast_of(case, device):
            ours, theirs = (stem.eval()(image).float() for stem in (fused, eager))
        finite = ours.isfinite(), theirs.isfinite()
        counts = {"hidden": (finite[0] & ~finite[1]).sum(), "spread": (finite[1] & ~finite[0]).sum()}
        same = torch.equal(ours.isnan(), theirs.isnan())
        found = [f"{int(count)} values {name}" for name, count in counts.items() if count]
        return found or ([] if same else ["NaN where the reference has infinity, or the other way round"])

    check("black", black)
    check("NaN", lambda: pixel(float("nan")))
    check("Inf", lambda: pixel(float("inf")))
    return found


def main() -> None:
    try:
        small_case("cuda" if torch.cuda.is_available() else "cpu")
    except Unavailable as error:
        print(f"small case: no fused path: {error}")
        return
    print("small case ran")


if __name__ == "__main__":
    main()
