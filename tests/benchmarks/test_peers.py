"""The comparison with other packages: what stands in a stem's place, equality, skipping, keeping records, tables."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

from benchmarks.kit import stems, store
from benchmarks.peers import run as peers
from benchmarks.peers import stems as peer_stems
from benchmarks.peers import tables as tables_peers
from mixpool import MixPoolStem, records

SMALL = stems.RESNET._replace(size=48, out_channels=8)
SAME = tables_peers.SAME


def blurpool_stem(parts: tuple) -> MixPoolStem:
    return MixPoolStem(*parts, pooling="blurpool")


@pytest.fixture
def parts():
    return stems.stem_parts(SMALL)


@pytest.fixture
def without_packages(monkeypatch):
    """As if neither antialiased-cnns nor kornia were installed."""

    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peer_stems.importlib, "import_module", missing)


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {peer_stems.PACKAGES[name]}, which is measured only where it is installed")


def test_the_stems_of_timm_and_mixpool_are_one_function(parts):
    ours = blurpool_stem(stems.stem_parts(SMALL))
    for name in ("timm BlurPool2d", "mixpool BlurPool"):
        found = peers.difference(ours, peer_stems.stem_of(name, parts), sizes=(48, 41))
        assert found.keys() == {"evaluation", "inside", "training", "gradient"}
        assert max(found.values()) < SAME, name


def test_stock_is_another_function(parts):
    found = peers.difference(blurpool_stem(parts), peer_stems.stem_of("stock", parts), sizes=(48,))
    assert min(found.values()) > 0.01


class ZeroBorderBlur(nn.Module):
    """A binomial mean of stride 2 that takes zeros beyond the border, as kornia's."""

    def forward(self, x):
        kernel = torch.tensor([1.0, 2, 1], dtype=x.dtype)
        kernel = (kernel[:, None] * kernel / 16).expand(x.shape[1], 1, 3, 3)
        return nn.functional.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def test_a_difference_at_the_border_is_told_from_one_everywhere(parts):
    conv, norm, act, pool = parts
    other = nn.Sequential(conv, norm, act, peer_stems._behind(lambda channels: ZeroBorderBlur())(8, pool))
    found = peers.difference(blurpool_stem(parts), other, sizes=(48,))
    assert found["inside"] < SAME < 0.01 < found["evaluation"]
    assert tables_peers._verdict(found) == "but for the border"
    assert tables_peers._verdict(found | {"inside": 1.0}) == "no"


def test_outputs_of_other_shapes_are_an_error(parts):
    conv, norm, act, _ = parts
    with pytest.raises(ValueError, match="one shape"):
        peers.difference(blurpool_stem(parts), nn.Sequential(conv, norm, act), sizes=(48,))


def test_packages_are_what_they_are_said_to_be(parts):
    needs("kornia")
    needs("antialiased_cnns")
    ours = blurpool_stem(stems.stem_parts(SMALL))
    kornia, adobe, narrow = (
        peers.difference(ours, peer_stems.stem_of(name, parts), sizes=(48,))
        for name in ("kornia BlurPool2D", "antialiased_cnns BlurPool, 3 taps", "antialiased_cnns window 2, 3 taps")
    )
    assert kornia["inside"] < SAME < kornia["evaluation"], "zeros beyond the border"
    assert max(adobe.values()) < SAME and narrow["inside"] > 0.01


@pytest.mark.parametrize("edits, is_same", [((), False), (("window",), False), (("window", "shortcuts"), True)])
def test_what_makes_the_resnets_differ(edits, is_same):
    needs("antialiased_cnns")
    known = {"window": peer_stems.window_of_three, "shortcuts": peer_stems.plain_shortcuts}
    base = peers.randomize(peer_stems._timm("resnet18", aa_layer=peer_stems.timm.layers.BlurPool2d))
    other = peers.copy_by_position(base, peer_stems.adobe_resnet(*(known[edit] for edit in edits)))
    assert (peers.difference(base, other, sizes=(64,))["evaluation"] < SAME) == is_same


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_and_statistics_are_copied_by_position():
    source = peers.randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    target = peers.copy_by_position(source, nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.BatchNorm2d(4)}))
    assert torch.equal(target["a"].weight, source[0].weight)
    assert torch.equal(target["b"].running_var, source[1].running_var) and not (source[1].running_var == 1).all()
    with pytest.raises(ValueError, match="same shapes"):
        peers.copy_by_position(source, nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))


def test_no_branch_of_a_randomized_network_is_switched_off():
    model = peer_stems._timm("resnet18")
    assert (model.layer1[0].bn2.weight == 0).all(), "timm starts so, and blurs in this branch would not be seen"
    assert (peers.randomize(model).layer1[0].bn2.weight != 0).all()


# --- stems ------------------------------------------------------------------------------------------------------------


def test_a_stem_has_its_own_parameters(parts):
    stem = peer_stems.stem_of("stock", parts)
    nn.init.zeros_(stem[0].weight)
    assert parts[0].weight.abs().max() > 0


def test_cmod_swaps_the_channels_of_the_default(parts):
    swapped = peer_stems.is_swapped(parts)
    cmod, auto = (peer_stems.stem_of(name, parts) for name in ("mixpool CMod", "mixpool auto"))
    assert [name == "cmod" for name in cmod.poolings] == [name == "modulus" for name in auto.poolings] == swapped
    assert 0 < sum(swapped) < 8 and set(cmod.poolings) == {"max", "cmod"}


def test_changes_are_by_direction_and_shift_over_all_and_over_the_swapped():
    photos = torch.rand(3, 3, 40, 40)

    def stem(x):  # its channels: a constant slope, and the image
        ramp = torch.linspace(0, 1, x.shape[-1]).expand(len(x), 1, *x.shape[-2:])
        return torch.cat([ramp, x[:, :1]], dim=1)

    module = nn.Module()
    module.forward = stem
    found = peers.changes(module, photos, [True, False], size=32)
    assert found["all"].keys() == {"horizontal", "vertical", "diagonal"}
    for way in found["all"]:
        assert found["swapped"][way] == {"1": 0.0, "2": 0.0, "4": 0.0}
        assert found["all"][way]["1"] == pytest.approx(2**0.5 / 2, rel=0.1), (
            "unrelated pixels, and half of the channels"
        )


def test_the_pooling_of_a_classifier_is_replaced():
    from torchvision.models import squeezenet1_0

    x, expected = torch.randn(1, 3, 99, 99), None
    for name in ("stock", "timm BlurPool2d", "mixpool BlurPool"):
        torch.manual_seed(0)
        model = squeezenet1_0().eval()
        assert peers.squeezenet_with(name, model, x) == 0
        with torch.no_grad():
            out = model.features[:3](x)
        if name == "stock":
            stock = out
        elif expected is None:
            expected = out
            assert out.shape == stock.shape and (out - stock).abs().max() > 0.01
        else:
            assert isinstance(model.features[0], MixPoolStem)
            torch.testing.assert_close(out, expected)


def test_cmod_takes_the_channels_that_the_default_conversion_takes():
    from torchvision.models import squeezenet1_0

    from mixpool.filters.gabor import gabor_bank

    photos = peers.normalize(peers.demo_photos(99)[1][:2])
    found = {}
    for name, pooling in (("mixpool auto", "modulus"), ("mixpool CMod", "cmod")):
        torch.manual_seed(0)
        model = squeezenet1_0().eval()
        model.features[0].weight.data = gabor_bank(96, 3, 7)
        count = peers.squeezenet_with(name, model, photos)
        found[name] = (count, [own == pooling for own in model.features[0].poolings])
        assert set(model.features[0].poolings) == {"max", pooling}
    assert found["mixpool auto"] == found["mixpool CMod"] and 0 < found["mixpool auto"][0] < 96


# --- records ----------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_says_so(tmp_path, without_packages):
    kept = store.Store(tmp_path / "peers.jsonl")
    record = peers.about("peer_stability", "photos", "kornia BlurPool2D", "kornia")
    build = peer_stems.POOLINGS["kornia BlurPool2D"].build
    (found,) = peers._tried(kept, record, lambda: build(8, nn.MaxPool2d(3, 2, 1)))
    assert found["skipped"].startswith(store.NOT_RUN) and "kornia" in found["skipped"] and "result" not in found
    peers.keep(kept, found)
    assert not kept.has(record), "a later run, with the package, measures it"
    (found,) = peers._tried(kept, record, lambda: 1.0)
    peers.keep(kept, found)
    assert [r["result"] for r in kept] == [1.0]
    assert list(peers._tried(kept, record, lambda: 2.0)) == [], "it is not measured twice"


def test_a_measurement_outlives_a_run_without_the_package(tmp_path):
    kept = store.Store(tmp_path / "peers.jsonl")
    record = peers.about("peer_stability", "photos", "kornia BlurPool2D", "kornia")
    peers.keep(kept, record | {"result": 1.0, "code": record["code"] | {"source": "older"}})
    peers.keep(kept, record | {"skipped": f"{store.NOT_RUN}no kornia"})
    assert [r.get("result") for r in kept] == [1.0]
    peers.keep(kept, record | {"result": 2.0})
    assert [r["result"] for r in records.read(tmp_path / "peers.jsonl")] == [2.0]


def test_a_measurement_takes_the_place_of_version_0_1s(tmp_path):
    kept = store.Store(tmp_path / "peers.jsonl")
    old, other = (peers.about("peer_stability", "photos", name, None) for name in ("mixpool CMod, blur=1", "stock"))
    for record in (old, other):
        peers.keep(kept, record | {"result": 1.0})
    peers.keep(kept, peers.about("peer_stability", "photos", "mixpool CMod", None, result=2.0))
    assert {r["provider"]: r["result"] for r in kept} == {"stock": 1.0, "mixpool CMod": 2.0}
    named = {r["provider"] for r in records.read(store.RECORDS / "peers.jsonl")}
    assert set(peer_stems.EARLIER.values()) <= named and set(peer_stems.EARLIER) <= set(peer_stems.MIXPOOL)


def test_costs_are_interleaved_with_stock(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "STEMS", ("stock", "mixpool auto", "kornia BlurPool2D"))
    monkeypatch.setattr(peers, "NETWORKS", {"stock": peer_stems.Provider(lambda: nn.Conv2d(3, 2, 3))})

    def package(name):
        raise stems.Unavailable("not here")

    monkeypatch.setattr(peer_stems, "package", package)
    kept = store.Store(tmp_path / "peers.jsonl")
    few = {mode: {"stem": 2, "resnet18": 2} for mode in ("forward", "full")}
    for record in peers.cost(kept, batch=1, size=32, rounds=few):
        peers.keep(kept, record)
    found = {(r["case"], r["mode"], r["provider"]): r for r in kept}
    assert len(found) == 8
    assert found["stem", "full", "stock"]["ratio_to_stock"]["p50"] == 1
    assert found["stem", "forward", "mixpool auto"]["ms"]["n"] == 2
    assert "not here" in found["stem", "forward", "kornia BlurPool2D"]["skipped"]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_peers, "RECORDS", tmp_path)
    return tmp_path


TABLES = (
    tables_peers.peers_functions,
    tables_peers.peers_cost,
    tables_peers.peers_stability,
    tables_peers.peers_network,
)


@pytest.mark.parametrize("make", TABLES)
def test_without_records_a_table_says_so(folder, make):
    assert make() == "Not run yet."


def test_tables_hold_what_the_records_say(folder):
    curve = {way: {"1": 0.125, "2": 0.25} for way in ("horizontal", "vertical", "diagonal")}
    flips = {way: {str(k): 5.0 for k in range(1, 9)} for way in curve}
    ends = {way: {k: [-1.0, 2.0] for k in ks} for way, ks in flips.items()}
    summary = {"top1": 61.5, "shift_consistency": 80.0, "flip_probability": flips}
    ci95 = {"top1": [-3.0, 4.0], "shift_consistency": [0.0, 1.0], "flip_probability": ends}
    network = {"num_modulus": 33, "summary": summary, "ci95": ci95, "difference": {"summary": summary, "ci95": ci95}}
    equal = {"evaluation": 1e-15, "inside": 1e-15, "training": 0.0, "gradient": 1e-14}
    ratio = {"p50": 1.25, "p20": 1.2, "p80": 1.3}
    about, ours = peers.about, ("mixpool auto", None)
    skipped = {"skipped": "not run: no kornia"}
    fields = {"mode": "forward", "ms": {"p50": 12.0}, "ratio_to_stock": ratio}
    found = [
        about("peer_function", "stem", *ours, base="timm", result=equal),
        about("peer_speed", "stem", *ours, **fields),
        about("peer_speed", "stem", *ours, **(fields | {"mode": "full", "ms": {"p50": 40.0}})),
        about("peer_stability", "photos", *ours, num_images=7, result={"all": curve, "swapped": curve}),
        about("peer_network", "squeezenet1_0", *ours, result=network),
    ]
    kinds = ("peer_function", "peer_speed", "peer_stability", "peer_network")
    found += [about(kind, "stem", "k", "kornia", base="timm", mode="forward", **skipped) for kind in kinds]
    (folder / "peers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    functions, cost, stability, network_table = (make() for make in TABLES)
    assert "| yes | 1.0e-15 | 1.0e-15 | 0 | 1.0e-14 |" in functions
    assert "| 12.0 | 1.25 (1.20 to 1.30) | 40.0 | 1.25 (1.20 to 1.30) |" in cost
    assert "| photos, 7 | mixpool auto | 0.125 / 0.125 / 0.125 | 0.250 / 0.250 / 0.250 |" in stability
    assert "| 33 | 61.5 (+61.5, -3.0 to +4.0) |" in network_table
    for text in (functions, cost, stability, network_table):
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert "not run: no kornia" in text and len({row.count("|") for row in rows}) == 1, "as many cells in each row"
