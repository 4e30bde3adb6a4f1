"""The command line, run in this process but where the process itself is the subject."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixpool
from mixpool import records
from mixpool.cli import command as cli
from mixpool.filters.gabor import gabor_bank

STOCK = "torchvision/squeezenet1_0"


def gabor_squeezenet(num_classes=1000):
    """A small stock model whose stem has something to choose from."""
    model = torchvision.models.squeezenet1_0(num_classes=num_classes).eval()
    model.features[0].weight.data.copy_(gabor_bank(96))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "stock.safetensors"
    torch.manual_seed(0)
    save_file(gabor_squeezenet().state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for i in range(3):
        noise = torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((320, 240)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def fails(capsys, *arguments):
    """The single line on stderr of a command that must fail with exit code 2 and print nothing."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse leaves this way
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    *notes, last = err.strip().splitlines()
    assert last.startswith("mixpool: error: ") and all(note.startswith("mixpool: note: ") for note in notes), err
    return last


# --- the process ------------------------------------------------------------------------------------------------------


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "mixpool", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"mixpool {mixpool.__version__}")


def test_help_and_errors_do_not_import_the_heavy_packages():
    script = (
        "import sys, mixpool.cli.command as cli\n"
        "try: cli.main(['inspect', 'resnet18', '--blur', '2'])\n"
        "except SystemExit as error: assert error.code == 2\n"
        "print(sorted({'matplotlib', 'timm', 'torchvision', 'skimage', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done
    assert done.stderr.startswith("mixpool: error: argument --blur") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [(), ("demo",), ("inspect",), ("convert",), ("theory",), ("evaluate",), ("train",)])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:" in out and f"mixpool {' '.join(command)}".strip() in out


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load_and_convert", interrupted)
    assert cli.main(["inspect", STOCK]) == 130
    assert capsys.readouterr().err == "mixpool: interrupted\n"


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_the_report_of_convert(checkpoint, capsys):
    assert cli.main(["inspect", "squeezenet1_0", "--checkpoint", str(checkpoint)]) == 0  # not a timm name
    out, err = capsys.readouterr()
    model = gabor_squeezenet()
    model.load_state_dict(load_file(checkpoint))
    assert out == f"{mixpool.convert(model)}\n" and err == ""


def test_inspect_json_with_images_and_plot(checkpoint, photos, tmp_path, capsys):
    (photos / "bad.jpg").write_bytes(b"not a photo")
    plot = tmp_path / "bank.png"
    arguments = ["inspect", STOCK, "--checkpoint", checkpoint, "--images", photos, "--json", "--plot", plot]
    assert cli.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["num_channels"] == 96 == len(report["channels"])
    assert report["num_modulus"] == sum(channel["kind"] == "modulus" for channel in report["channels"])
    assert report["agreement"]["num_images"] == 3 and 0 <= report["agreement"]["top1"] <= 1
    assert report["images"]["used"] == 3 and list(report["images"]["failed"]) == ["bad.jpg"]
    assert "cannot read bad.jpg" in err and "1 image(s) left out" in err
    measured = [c for c in report["channels"] if c["fidelity"] is not None]
    assert len(measured) >= 20 and all(-1 <= c["fidelity"] <= 1 for c in measured)
    assert all(c["fidelity"] is not None for c in report["channels"] if c["kind"] == "modulus")
    stats = mixpool.analyze(load_file(checkpoint)["features.0.weight"], 2)
    for name in ("predicted_gap", "predicted_correlation_blur3", "predicted_instability_max"):
        assert [c[name] for c in report["channels"]] == pytest.approx(getattr(stats, name).tolist(), abs=1e-6)
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_options_reach_convert(checkpoint, capsys):
    options = ["--select", "0,4,10-12", "--blur", "1", "--max-blur", "3", "--imag", "free", "--stem", "features.0"]
    assert cli.main(["inspect", STOCK, "--checkpoint", str(checkpoint), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    swapped = [channel["channel"] for channel in report["channels"] if channel["kind"] == "modulus"]
    assert swapped == [0, 4, 10, 11, 12]
    assert (report["blur"], report["max_blur"], report["imag"]) == (1, 3, "free")


@pytest.mark.parametrize("imag", ["tied", "free"])
def test_inspect_shows_the_plan_that_a_converted_model_has(imag, checkpoint, tmp_path, capsys):
    output = tmp_path / "mixed.safetensors"
    options = ["--select", "0,4,10-12", "--blur", "1", "--imag", imag]
    cli.main(["convert", STOCK, "--checkpoint", str(checkpoint), "--output", str(output), *options])
    capsys.readouterr()
    plot = tmp_path / "bank.png"
    assert cli.main(["inspect", STOCK, "--checkpoint", str(output), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "features.0 -> features.1 -> features.2" in out and "no images given" not in out
    assert f"5 of 96 channels on modulus pooling (blur=1, imag={imag})" in out and plot.stat().st_size > 5000
    assert cli.main(["inspect", STOCK, "--checkpoint", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    swapped = [channel["channel"] for channel in report["channels"] if channel["kind"] == "modulus"]
    assert swapped == [0, 4, 10, 11, 12] and report["select"] is None and report["agreement"] is None
    assert {channel["reason"] for channel in report["channels"]} == {"as the model has it"}
    stats = mixpool.analyze(load_file(checkpoint)["features.0.weight"], 2)
    assert [c["bandwidth"] for c in report["channels"]] == pytest.approx(stats.bandwidth.tolist(), abs=1e-4)
    message = fails(capsys, "inspect", STOCK, "--checkpoint", output, "--select", "all", "--max-blur", "3")
    assert "converted already: its plan is shown as it is, without --select and --max-blur" in message


def test_inspect_of_registered_models_and_of_their_checkpoints(tmp_path, capsys):
    assert cli.main(["inspect", "mixpool_resnet18"]) == 0
    out, err = capsys.readouterr()
    assert "conv1 -> bn1 -> act1 -> maxpool\n48 of 64 channels on modulus pooling" in out and "random weights" in err
    model = timm.create_model("mixpool_resnet18", num_classes=3, select="all", blur=1)
    average = timm.create_model("mixpool_resnet18", num_classes=3, select="none", blur=1)
    entries = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    # As a training leaves it: built with 3 classes, which need not be said again.
    torch.save(entries | {"arch": "mixpool_resnet18", "args": {"num_classes": 3}}, tmp_path / "last.pth.tar")
    assert cli.main(["inspect", "mixpool_resnet18", "--checkpoint", str(tmp_path / "last.pth.tar")]) == 0
    out, err = capsys.readouterr()
    assert (
        "0 of 64 channels on modulus pooling" in out
        and err == "mixpool: note: took the moving average of the weights\n"
    )


def test_random_weights_are_announced(capsys):
    assert cli.main(["inspect", "resnet18", "--select", "none"]) == 0
    out, err = capsys.readouterr()
    assert "0 of 64 channels" in out and "random weights" in err


@pytest.mark.parametrize("entry, prefix", [("state_dict", ""), ("model", "module."), (None, "module._orig_mod.")])
def test_torch_checkpoints(entry, prefix, tmp_path, checkpoint, capsys):
    state = {prefix + key: value for key, value in load_file(checkpoint).items()}
    path = tmp_path / "stock.pth"
    torch.save(state if entry is None else {entry: state, "epoch": 3}, path)
    assert cli.main(["inspect", STOCK, "--checkpoint", str(path)]) == 0
    from_torch = capsys.readouterr().out
    cli.main(["inspect", STOCK, "--checkpoint", str(checkpoint)])
    assert from_torch == capsys.readouterr().out


def test_another_number_of_classes(tmp_path, capsys):
    path = tmp_path / "ten.pt"
    torch.save(gabor_squeezenet(num_classes=10).state_dict(), path)
    assert "--num-classes" in fails(capsys, "inspect", STOCK, "--checkpoint", path)
    assert cli.main(["inspect", STOCK, "--checkpoint", str(path), "--num-classes", "10"]) == 0


# --- errors -----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_errors_are_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["inspect", "resnet81"], "neither timm nor torchvision .*'resnet81'; did you mean"),
        (["inspect", "torchvision/resnet81"], "neither timm nor torchvision"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "none.pth"], "does not exist"),
        (["inspect", STOCK, "--checkpoint", tmp_path], "is a folder"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "text.pth"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "cut.safetensors"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "evil.pth"], "cannot read the checkpoint"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "list.pth"], "expected a state dict"),
        (["inspect", STOCK, "--checkpoint", tmp_path / "other.safetensors"], "keys missing .*1 keys unexpected"),
        (["inspect", STOCK, "--checkpoint", checkpoint, "--pretrained"], "got both"),
        (["inspect", STOCK, "--images", tmp_path / "nowhere"], "does not exist"),
        (["inspect", STOCK, "--images", tmp_path / "empty"], "found no file named"),
        (["inspect", STOCK, "--select", "some"], "--select auto, all, none or channel numbers"),
        (["inspect", STOCK, "--select", "0,96"], "channels 0 to 95, got 96"),
        (["inspect", STOCK, "--stem", "nothing"], "nothing"),
        (["inspect", STOCK, "--limit", "-3"], "--limit"),
        (["inspect", STOCK, "--plot", tmp_path / "x.xyz"], r"\*\.png"),
        (["inspect", "torchvision/mobilenet_v2"], "features.0.0"),
        (["demo", "--pretrained"], "--pretrained needs --model"),
        (["demo", "--output", checkpoint], "is a file"),
        ([], "COMMAND"),
        (["inspekt"], "inspekt"),
    ):
        assert re.search(message, fails(capsys, *arguments)), arguments


def test_pretrained_weights_without_a_network(monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    message = fails(capsys, "inspect", STOCK, "--pretrained")
    assert "cannot get the pretrained weights" in message and "no route to host" in message


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imag", ["tied", "free"])
def test_convert_writes_what_a_converted_model_loads(imag, checkpoint, tmp_path, capsys):
    output = tmp_path / "mixed.safetensors"
    arguments = ["convert", STOCK, "--checkpoint", checkpoint, "--output", output, "--imag", imag, "--blur", "1"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert str(output) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]  # nothing half-written stays behind

    converted = gabor_squeezenet()
    converted.load_state_dict(load_file(checkpoint))
    report = mixpool.convert(converted, imag=imag, blur=1)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "model": STOCK,
        "blur": "1",
        "max_blur": "1",
        "imag": imag,
        "select": "auto",
        "stem": "",
        "num_modulus": str(report.num_modulus),
        "mixpool_version": mixpool.__version__,
    }
    fresh = torchvision.models.squeezenet1_0().eval()  # other weights, so another plan of its own
    mixpool.convert(fresh, imag=imag)
    fresh.load_state_dict(load_file(output))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(fresh(images), converted(images))


def test_convert_with_images_keeps_the_calibration(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "mixed.safetensors"
    arguments = ["convert", STOCK, "--checkpoint", checkpoint, "--output", output, "--images", photos]
    assert cli.main([*map(str, arguments), "--select", "all"]) == 0
    state = load_file(output)
    assert "before any training, on the 3 images" in capsys.readouterr().out
    assert (state["features.0.calibration"][:, 0] != 1).any()


def test_convert_refuses_to_overwrite(checkpoint, tmp_path, capsys):
    output = tmp_path / "mixed.safetensors"
    output.write_bytes(b"precious")
    arguments = ["convert", STOCK, "--checkpoint", checkpoint, "--output", output]
    assert "--force" in fails(capsys, *arguments)
    assert output.read_bytes() == b"precious"
    assert cli.main([str(argument) for argument in arguments] + ["--force"]) == 0
    assert "features.0.plan" in load_file(output)
    capsys.readouterr()

    before = checkpoint.read_bytes()
    assert "checkpoint itself" in fails(capsys, *arguments[:-1], checkpoint, "--force")
    assert checkpoint.read_bytes() == before
    again = ["convert", STOCK, "--checkpoint", output, "--output", tmp_path / "again.safetensors"]
    assert "mixed.safetensors is a converted model already" in fails(capsys, *again)
    assert not (tmp_path / "again.safetensors").exists()
    message = fails(capsys, *(part.replace(STOCK, "mixpool_resnet18") for part in map(str, [*again[:2], *again[4:]])))
    assert "mixpool_resnet18 is a converted model already" in message


def test_convert_checks_the_output_first(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load_and_convert", lambda options: pytest.fail("loaded the model first"))
    for output, message in (("x.pth", "safetensors"), ("nowhere/x.safetensors", "existing folder")):
        assert message in fails(capsys, "convert", STOCK, "--checkpoint", checkpoint, "--output", tmp_path / output)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mixed.safetensors"
    path.write_bytes(b"old")

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        cli.write_safetensors(torch.nn.Linear(2, 2), path, {})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_measures_and_draws(tmp_path, monkeypatch, capsys):
    from mixpool.evaluation import demo

    # As the real one, smaller.
    monkeypatch.setattr(demo, "SIZE", 96)
    monkeypatch.setattr(demo, "SHIFTS", (1, 2, 3, 4, 6, 8))
    assert cli.main(["demo", "--output", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    with Image.open(tmp_path / "new" / "demo.png") as image:
        assert image.width == 1600
    rows = re.findall(r"^  (\S.*?)\s{2,}([\d. ]+)$", out, flags=re.MULTILINE)
    assert [name for name, _ in rows] == 2 * list(demo.POOLINGS)
    at_one_pixel = {name: float(values.split()[0]) for name, values in rows[:4]}
    # The claim of the picture: the swapped channels move least under mixpool, most under max pooling.
    assert at_one_pixel["mixpool"] < 0.75 * min(at_one_pixel[name] for name in ("BlurPool", "CMod (no blur)"))
    assert at_one_pixel["max pooling"] == max(at_one_pixel.values())
    assert all(0 < float(value) < 1.5 for _, values in rows for value in values.split())


def test_demo_of_a_small_kernel_says_so(tmp_path, capsys):
    message = fails(capsys, "demo", "--output", tmp_path, "--model", "torchvision/vgg11")
    assert "5 taps or more" in message and "--pretrained" in message
    assert list(tmp_path.iterdir()) == []


# --- theory -----------------------------------------------------------------------------------------------------------


def test_theory_measures_and_draws(tmp_path, capsys):
    folder = tmp_path / "new"
    arguments = ["theory", "--limit", "2", "--size", "64", "--depth", "2", "2", "--output", str(folder)]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (record,) = records.read(folder / "theory.jsonl")
    assert record["num_photos"] == 2 and record["params"]["depth"] == 2 and "scikit-image" in record["photos"]
    pictures = re.findall(r"^picture: (.*)$", out, flags=re.MULTILINE)
    assert sorted(pictures) == sorted(str(path) for path in folder.glob("*.png")) and len(pictures) == 4
    (gap,) = re.findall(r"^mean gap +([\d.]+) \(([\d.]+) to ([\d.]+)\)$", out, flags=re.MULTILINE)
    assert 0.2 < float(gap[1]) <= float(gap[0]) <= float(gap[2]) < 1
    assert re.search(r"^analytic packets +8 of 32$", out, flags=re.MULTILINE)


def test_theory_on_a_folder_names_what_it_cannot_read(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.theory.plots.write_figures", lambda record, folder: [])
    (photos / "bad.jpg").write_bytes(b"not a photo")
    folder = tmp_path / "out"
    options = ["--size", "64", "--depth", "2", "--wavelet", "qshift_06", "--limit", "0"]
    assert cli.main(["theory", "--images", str(photos), "--output", str(folder), *options]) == 0
    err = capsys.readouterr().err
    assert "3 of 4 images" in err and "cannot read bad.jpg" in err and "1 image(s) left out" in err
    (record,) = records.read(folder / "theory.jsonl")
    assert record["num_photos"] == 3 and record["params"]["wavelet"] == "qshift_06"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--depth", "5"], "invalid choice: 5"),
        (["--depth", "1"], "invalid choice: 1"),
        (["--depth", "x"], "invalid int"),
        (["--wavelet", "haar"], "expected a q-shift family of"),
        (["--size", "60"], "--size 89 or more at depth 3"),
        (["--depth", "4", "--wavelet", "qshift_32"], "at depth 4 of qshift_32"),
        (["--size", "0"], "at least 1"),
        (["--limit", "-1"], "at least 0"),
        (["--images", "no-such-folder"], "no-such-folder does not exist"),
        (["--images", "."], "found no file named"),
    ],
)
def test_theory_refuses_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert message in fails(capsys, "theory", "--output", tmp_path / "out", *options)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_theory_refuses_blank_photos(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80), "gray").save(tmp_path / "photos" / "blank.png")
    arguments = "theory", "--images", tmp_path / "photos", "--output", tmp_path, "--size", "64", "--depth", "2"
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "expected photos that show something" in capsys.readouterr().err.splitlines()[-1]


# --- the shared data --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_squeezenet_on_real_photos(shared_data, capsys):
    weights = shared_data / "squeezenet" / "squeezenet1_0_imagenet.safetensors"
    folder = shared_data / "imagenet_sample" / "val"
    arguments = ["inspect", "squeezenet1_0", "--checkpoint", weights, "--images", folder, "--limit", "24", "--json"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_channels"] == 96 and 15 <= report["num_modulus"] <= 60
    assert report["images"] == {"used": 24, "found": 500, "failed": {}}
    assert report["agreement"]["top1"] > 0.6
