"""Image classification: YAMLs run, data are read or refused as they should be, studies work."""

from __future__ import annotations

import difflib
import gzip
import json
import re
import struct
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from lightning_pc.cli import main as lightning_pc_main
from lightning_pc.errors import DivergenceError
from lightning_pc.precisions import Spiking
from recipes.common.model import SquaredError
from recipes.common.queue import Results, key, ordered
from recipes.common.queue import main as queue_main
from recipes.common.training import train
from recipes.image_classification import calibration, evaluate, files, long, model, study
from recipes.image_classification.corruptions import INTENSITIES, SETTINGS, corrupt
from recipes.image_classification.data import CIFAR10, MNIST, SVHN, FashionMNIST
from recipes.image_classification.files import DataError
from recipes.image_classification.folders import ImageFolder
from tests.marks import mostly_slow

HERE = Path(study.__file__).parent
YAMLS = sorted(HERE.glob("*/*.yaml"))
IDS = [path.relative_to(HERE).as_posix() for path in YAMLS]
COUNTS = {"train": 120, "test": 40}
VAL = 40


def pixels(split, side, channels):
    draw = np.random.default_rng(len(split))
    images = draw.integers(0, 256, (COUNTS[split], side, side, channels), dtype=np.uint8)
    return images, np.arange(COUNTS[split]) % 10


def write_idx(folder):
    folder.mkdir()
    for split, name in files.IDX.items():
        images, labels = pixels(split, 28, 1)
        for kind, header, array in (
            ("images-idx3", struct.pack(">4i", 2051, len(images), 28, 28), images),
            ("labels-idx1", struct.pack(">2i", 2049, len(labels)), labels.astype(np.uint8)),
        ):
            packed = gzip.compress(header + array.tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(packed)


def write_parquet(folder, image):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    for split in COUNTS:
        images, labels = pixels(split, 32, 3)
        for part, rows in enumerate(np.array_split(np.arange(len(labels)), 2)):
            content = {
                image: [{"bytes": png(images[row]), "path": ""} for row in rows],
                "label": labels[rows].tolist(),
            }
            parquet.write_table(pa.table(content), folder / f"{split}-0000{part}-of-2.parquet")


def png(image):
    import io

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("mnist", "fashion_mnist"):
        write_idx(folder / name)
    write_parquet(folder / "cifar10", "img")
    write_parquet(folder / "svhn", "image")
    return folder


@pytest.fixture
def tiny(data_dir, monkeypatch):
    """Every job of a study becomes one of two batches or so of random images."""
    small = {
        **{"data.checksums": False, "data.val_size": VAL, "data.train_size": 24},
        **{"data.batch_size": 12, "trainer.max_epochs": 1, "trainer.accelerator": "cpu"},
    }
    return lambda job: job | {"settings": job["settings"] | small}


def shrink(path, data_dir):
    folder = data_dir / study.DATA.get(path.parent.name, "cifar10")
    args = [f"--data.data_dir={folder}", "--data.checksums=false", f"--data.val_size={VAL}"]
    args += ["--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]
    return args + {"alexnet": ["--model.net.units=32"], "resnet18": ["--model.net.width=4"]}.get(
        path.parent.name, []
    )


QUICK = [path for path in YAMLS if path.parent.name == "cnn"]


@pytest.mark.parametrize("path", mostly_slow(YAMLS, *QUICK), ids=IDS)
def test_yaml_runs(path, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_pc"])
    command = ["fit", "-c", str(path), "--trainer.fast_dev_run=1", *shrink(path, data_dir)]
    cli = lightning_pc_main(command)
    strategy = cli.trainer.strategy
    if path.stem == "bp":
        assert not hasattr(strategy, "report")
        return
    assert strategy.report.algorithm == path.stem.removesuffix("_spiking")
    assert isinstance(strategy.settings.precisions, Spiking) == path.stem.endswith("_spiking")
    # a node at the input of every nonlinearity, and all of them were reached
    kinds = (nn.GELU, nn.ReLU, nn.Hardtanh)
    assert len(strategy.report.nodes) == sum(isinstance(m, kinds) for m in cli.model.modules())
    assert min(strategy.report.peak_energy.values()) > 0


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem != "bp"], ids=lambda p: str(p)[-20:])
def test_yamls_differ_in_a_handful_of_lines(path):
    ours, backprop = (
        [line for line in p.read_text().splitlines() if not line.startswith("#")]
        for p in (path, path.with_name("bp.yaml"))
    )
    changed = [line for line in difflib.ndiff(backprop, ours) if line[0] == "+"]
    assert len(changed) <= 10, changed


def test_sizes_of_the_study():
    """Few images, more, all of them for few epochs, and as the YAMLs say."""
    given = {
        size: {
            json.dumps(j["settings"])
            for j in study.jobs()
            if (j["size"], j["task"]) == (size, "cnn")
        }
        for size in range(4)
    }
    assert given == {
        0: {json.dumps(study.REDUCED)},
        1: {json.dumps(study.HALFWAY)},
        2: {'{"trainer.max_epochs": 15}'},
        3: {"{}"},
    }
    assert {j["row"] for j in study.jobs() if j["size"] == 2} == {"cnn", "alexnet*", "vgg5"}


def test_sizes_of_the_networks():
    for net, shape in (
        (model.MLP(), (1, 28, 28)),
        (model.CNN(size=28, channels=1), (1, 28, 28)),
        (model.WidthCNN(3, size=40, classes=7), (3, 40, 40)),
        (model.VGG7(size=48), (3, 48, 48)),
        (model.ResNet18(4), (3, 32, 32)),
    ):
        classes = 7 if isinstance(net, model.WidthCNN) else 10
        assert net(torch.randn(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in model.WidthCNN(1).parameters()) == 20_354
    with pytest.raises(ValueError, match="too small"):
        model.VGG5(size=8)


def test_scaled_inputs_are_made_up_for_before_anything_is_learned():
    nets = []
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        nets.append(model.MLP(scale=scale))
    one, other = nets
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(other(images), one(images))
    for net in nets:
        F.cross_entropy(net(images), torch.arange(4)).backward()
    torch.testing.assert_close(other[1].weight.grad, 0.1 * one[1].weight.grad)
    torch.testing.assert_close(other[3].weight.grad, one[3].weight.grad)
    with pytest.raises(ValueError, match="scale=0: expected a factor of the inputs above 0"):
        model.MLP(scale=0)


def test_splits_are_held_out_and_in_order(data_dir):
    data = MNIST(str(data_dir / "mnist"), val_size=VAL, train_size=50, checksums=False)
    data.setup("fit")
    images, labels = pixels("train", 28, 1)
    for split, part in (("train", slice(0, 50)), ("val", slice(80, None))):
        found, classes = data.splits[split].tensors
        assert torch.equal(found, torch.from_numpy(images[part]).permute(0, 3, 1, 2))
        assert torch.equal(classes, torch.from_numpy(labels[part]))
        assert found.dtype == torch.uint8


def test_parquet_and_idx_hold_the_same_pixels_as_were_written(data_dir):
    for kind, name in ((CIFAR10, "cifar10"), (SVHN, "svhn")):
        found, labels = kind(str(data_dir / name), checksums=False).read("test")
        assert np.array_equal(found, pixels("test", 32, 3)[0])
        assert np.array_equal(labels, pixels("test", 32, 3)[1])
    first, _ = files.read_parquet(data_dir / "cifar10", "train", "img", 70)
    assert np.array_equal(first, pixels("train", 32, 3)[0][:70])


def test_mat_files(tmp_path):
    io = pytest.importorskip("scipy.io")
    images, labels = pixels("test", 32, 3)
    y = np.where(labels == 0, 10, labels)[:, None]
    io.savemat(tmp_path / "test_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    found, classes = SVHN(str(tmp_path), checksums=False).read("test")
    assert np.array_equal(found, images)
    assert np.array_equal(classes, labels)
    with pytest.raises(DataError, match="SVHN has 26,032"):
        SVHN(str(tmp_path)).read("test")
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat is missing"):
        SVHN(str(tmp_path)).read("train")


def batch_of(data, training):
    class Trainer:
        lightning_module = nn.Linear(1, 1)

    Trainer.training = training
    Trainer.lightning_module.dtype = torch.float64
    data.trainer = Trainer()
    images = torch.from_numpy(pixels("train", 32, 3)[0]).permute(0, 3, 1, 2)
    return images, data.on_after_batch_transfer((images, torch.zeros(len(images))), 0)[0]


def test_normalised_on_the_device_in_the_dtype_of_the_module():
    images, found = batch_of(CIFAR10(crop=4, flip=True), training=False)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (CIFAR10.mean, CIFAR10.deviation))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), (images / 255 - mean) / deviation)


def test_training_images_are_cropped_and_mirrored_each_on_its_own():
    torch.manual_seed(0)
    images, found = batch_of(CIFAR10(crop=2, flip=True), training=True)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (CIFAR10.mean, CIFAR10.deviation))
    found = (found.float() * deviation + mean).mul(255).round()
    padded = nn.functional.pad(images.float(), (2, 2, 2, 2))
    drawn = set()
    for image, result in zip(padded, found, strict=True):
        ways = {
            (y, x, flip): (crop.flip(2) if flip else crop)
            for y in range(5)
            for x in range(5)
            for crop in [image[:, y : y + 32, x : x + 32]]
            for flip in (False, True)
        }
        matching = [way for way, crop in ways.items() if (crop - result).abs().max() <= 1]
        assert len(matching) == 1
        drawn.add(matching[0])
    assert len(drawn) > 25  # of the 50


def test_a_batch_is_augmented_and_seen_once_under_ipc(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_pc"])
    calls, seen = [], []
    augmented, forward = CIFAR10.augmented, model.ImageClassifier.forward
    monkeypatch.setattr(
        CIFAR10, "augmented", lambda self, x: calls.append(len(x)) or augmented(self, x)
    )

    def watched(self, images):
        if self.training:
            seen.append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(model.ImageClassifier, "forward", watched)
    path = HERE / "cnn" / "ipc.yaml"
    extra = ["--data.crop=4", "--data.flip=true", "--trainer.fast_dev_run=1"]
    lightning_pc_main(["fit", "-c", str(path), *shrink(path, data_dir), *extra])
    assert calls == [2]
    assert len(seen) == 1


def folders(root, per_class=6, classes=("cat", "dog"), splits=("train", "test")):
    draw = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                image = draw.integers(120 * label, 120 * label + 100, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{number}.png")
    return root


def test_own_images_in_folders(tmp_path):
    data = ImageFolder(str(folders(tmp_path / "own", per_class=10)), size=8, val_share=0.2)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        **{"train": 16, "val": 4, "test": 20}
    }
    assert data.classes == 2
    assert data.names == ["cat", "dog"]
    assert torch.bincount(data.splits["val"].tensors[1]).tolist() == [2, 2]
    images = data.splits["train"].tensors[0]
    assert images.shape == (16, 3, 8, 8)
    assert data.mean == pytest.approx((images / 255).mean((0, 2, 3)).tolist(), abs=1e-5)


def of_the_readme(language):
    """The block of the README's user path."""
    text = (HERE.parent / "README.md").read_text()
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return block


def test_own_images_own_network_from_training_to_plain_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lightning_pc"])
    folders(tmp_path / "images", per_class=8)
    (tmp_path / "own.py").write_text(of_the_readme("python"))
    recipe = of_the_readme("yaml")
    assert len(recipe.splitlines()) == 9
    (tmp_path / "own.yaml").write_text(recipe)
    cli = lightning_pc_main(["fit", "-c", "own.yaml", "--trainer.accelerator=cpu"])
    assert cli.trainer.strategy.report.algorithm == "ipc"
    assert (tmp_path / "energy.png").exists()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    evaluate.main([str(checkpoint), "out", "-c", "own.yaml"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["test"]["accuracy"] == 100  # dark against bright
    assert report["test_calibrated"]["loss"] <= report["test"]["loss"]
    assert report["data.names"] == ["cat", "dog"]
    assert (tmp_path / "out" / "reliability.png").exists()
    import own

    plain = own.OwnCNN()
    plain.load_state_dict(torch.load(tmp_path / "out" / "weights.pt", weights_only=True))
    for name, value in cli.model.net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    with pytest.raises(SystemExit):
        evaluate.main(["nothing.ckpt", "out", "-c", "own.yaml"])
    assert "expected a checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected \(\d, 2\), a logit for each of the 2 classes"):
        lightning_pc_main(["fit", "-c", "own.yaml", "--model.net.classes=3"])


def test_temperature_is_the_one_that_was_put_in():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert evaluate.temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)


def test_damaged_and_missing_files(tmp_path, data_dir):
    with pytest.raises(FileNotFoundError, match=r"four \.gz files"):
        MNIST(str(tmp_path)).setup("fit")
    write_idx(tmp_path / "mnist")
    with pytest.raises(DataError, match=r"are not MNIST's.*checksums: false"):
        MNIST(str(tmp_path / "mnist")).setup("fit")
    images = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:500])
    with pytest.raises(DataError, match=r"train-images.*cut off.*fetch it again"):
        FashionMNIST(str(tmp_path / "mnist"), checksums=False).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"holds no train-\*\.parquet"):
        CIFAR10(str(tmp_path)).setup("fit")
    write_parquet(tmp_path / "cifar10", "img")
    last = tmp_path / "cifar10" / "train-00001-of-2.parquet"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00001.*cut off"):
        CIFAR10(str(tmp_path / "cifar10"), checksums=False).setup("fit")
    last.unlink()
    with pytest.raises(DataError, match="are not CIFAR10's"):
        CIFAR10(str(tmp_path / "cifar10")).setup("fit")


def test_sizes_and_classes_that_do_not_fit(data_dir, tmp_path):
    folder = str(data_dir / "mnist")
    for sizes in ({"val_size": 120}, {"val_size": -1}, {"val_size": 40, "train_size": 81}):
        with pytest.raises(DataError, match="expected sizes above 0"):
            MNIST(folder, checksums=False, **sizes).setup("fit")
    with pytest.raises(ValueError, match="crop=-1"):
        MNIST(folder, crop=-1)
    data = MNIST(folder, checksums=False, val_size=VAL)
    data.classes = 9
    with pytest.raises(DataError, match="from 0 to 9: expected 9 classes"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match="train/<class>"):
        ImageFolder(str(tmp_path)).setup("fit")
    folders(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match="expected one for each class"):
        ImageFolder(str(tmp_path / "one")).setup("fit")
    (folders(tmp_path / "more") / "test" / "cow").mkdir()
    with pytest.raises(DataError, match="has cow: classes are cat, dog"):
        ImageFolder(str(tmp_path / "more")).setup("fit")
    untested = ImageFolder(str(folders(tmp_path / "untested", splits=("train",))))
    untested.setup("fit")
    with pytest.raises(FileNotFoundError, match="put images of each class there"):
        untested.test_dataloader()
    (tmp_path / "untested" / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png is damaged or no image"):
        ImageFolder(str(tmp_path / "untested")).setup("fit")


def test_without_datasets_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets.*data_dir"):
        MNIST().setup("fit")


@pytest.mark.parametrize("name", SETTINGS)
def test_corruptions_get_worse(name):
    torch.manual_seed(0)
    ramp = torch.linspace(0, 0.8, 32) * torch.tensor([1, 0.3, 0.3]).view(3, 1, 1)
    images = ramp.expand(8, 3, 32, 32) + 0.2 * torch.rand(8, 3, 32, 32)
    before = images.clone()
    errors = []
    for intensity in INTENSITIES:
        found = corrupt(images, name, intensity)
        assert found.shape == images.shape
        assert 0 <= found.min() <= found.max() <= 1
        assert torch.equal(found, corrupt(images, name, intensity))
        errors.append(float((found - images).abs().mean()))
    assert torch.equal(images, before)
    assert errors[0] > 0
    assert errors == sorted(errors)


def test_unknown_corruptions_are_errors():
    with pytest.raises(ValueError, match="'fog': expected one of rotation, gaussian_blur"):
        corrupt(torch.rand(1, 3, 8, 8), "fog", 1)
    with pytest.raises(ValueError, match="intensity 6: expected one of 1 to 5"):
        corrupt(torch.rand(1, 3, 8, 8), "hue", 6)


@pytest.mark.slow
def test_study_runs_and_resumes(tiny, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jobs = [tiny(j) for j in ordered(study.jobs(), [0]) if j["row"] in ("mnist", "width 2")]
    jobs = [j for j in jobs if j["seed"] == 0]
    out = tmp_path / "study.json"
    small = study.Study(
        study.STUDY.module, "tiny", lambda: jobs, study.run, study.tables, study.picture
    )
    queue_main(small, ["--out", str(out), "--data_dir", str(data_dir)])
    rows = Results(out).rows(jobs)
    assert len(rows) == 9
    assert all(0 <= row["test"] <= 100 and row["epochs"] == 1 for row in rows)
    drawn = [axes for axes in study.picture(rows).axes if axes.axison]
    assert [len(axes.lines) for axes in drawn] == [5, 4]
    kept = study.MODELS / "width 2_ipc_size0_0.ckpt"
    (job,) = (j for j in jobs if (j["row"], j["algorithm"]) == ("width 2", "ipc"))
    config = ["-c", str(HERE / "width" / "ipc.yaml")]
    evaluate.main([str(kept), "out", *config, *study.arguments(job, str(data_dir))])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = (r for r in rows if (r["row"], r["algorithm"]) == ("width 2", "ipc"))
    assert found["test"]["accuracy"] == pytest.approx(row["test"], abs=1e-3)
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("was done"))
    queue_main(small, ["--out", str(out), "--data_dir", str(data_dir)])


def test_divergence_is_a_result(monkeypatch):
    def diverge(*_, **__):
        raise DivergenceError("The loss is nan.")

    monkeypatch.setattr(study, "train", diverge)
    rows = [j | study.run(j, None) for j in study.jobs()[:3]]
    assert all(row["diverged"] and row["test"] is None for row in rows)
    assert study.tables(rows)[0].row_count == 3


class _Diverge(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            raise DivergenceError("The loss is nan.")


def test_after_a_divergence_the_best_epoch_so_far_is_tested(tiny, data_dir):
    job = next(j for j in study.jobs() if j["row"] == "mnist" and j["algorithm"] == "ipc")
    arguments = [*study.arguments(tiny(job), str(data_dir)), "--trainer.max_epochs=4"]
    run = train(HERE / "mnist" / "ipc.yaml", 0, arguments, callbacks=[_Diverge()])
    assert run.diverged
    assert len(run.val_accuracy) == 2
    assert run.test_accuracy > 0


def test_every_job_is_its_own():
    for jobs in (study.jobs(), calibration.jobs(), long.jobs()):
        assert len({key(job) for job in jobs}) == len(jobs)


def test_test_images_are_of_the_best_epoch(tiny, data_dir, tmp_path, monkeypatch):
    """Test is touched once, with the weights that validation chose."""
    monkeypatch.chdir(tmp_path)
    job = next(j for j in study.jobs() if j["row"] == "mnist" and j["algorithm"] == "bp")
    job = tiny(job)
    job["settings"] |= {"trainer.max_epochs": 4, "optimizer.lr": 0.05}
    tested = []
    end = model.ImageClassifier.on_test_epoch_end
    monkeypatch.setattr(
        model.ImageClassifier,
        "on_test_epoch_end",
        lambda self: tested.append(self.net[1].weight.clone()) or end(self),
    )
    study.run(job, str(data_dir))
    kept = torch.load(study.MODELS / "mnist_bp_size0_0.ckpt", weights_only=True)
    assert len(tested) == 1
    assert torch.equal(tested[0], kept["state_dict"]["net.1.weight"])


def epoch(val, clean, error):
    shifts = [f"{name} {i}" for name in SETTINGS for i in INTENSITIES]
    return {
        "val": val,
        "measured": {"clean": [clean, error]} | {s: [clean / 2, 2 * error] for s in shifts},
    }


def test_pairs_of_models_are_chosen_as_stated():
    rows = [
        {"algorithm": "bp", "seed": 0, "size": 0, "task": "cnn"}
        | {"epochs": [epoch(50, 51, 0.1), epoch(60, 61, 0.2)]},
        {"algorithm": "ipc", "seed": 0, "size": 0, "task": "cnn"}
        | {"epochs": [epoch(40, 50.6, 0.03), epoch(55, 52, 0.04)]},
    ]
    best = calibration.compared(rows)["best validation accuracy"]
    assert [m["clean"] for (m,) in best] == [[61, 0.2], [52, 0.04]]
    pair = calibration.matched(rows)
    assert [m["clean"] for m in pair] == [[51, 0.1], [50.6, 0.03]]
    assert calibration.figures([pair[0]], 3, 1) == [0.2] * 6
    first, second = calibration.tables(rows)
    assert list(first.columns[1].cells) == ["0.200", "0.040", "61.0", "52.0"]
    assert list(second.columns[2].cells) == ["0.200", "0.060", "25.5", "25.3"]
    rows.append(rows[1] | {"seed": 1, "epochs": []})  # it diverged at once
    assert len(calibration.models(rows, "ipc")) == 1
    rows[1]["epochs"] = [epoch(40, 30, 0.03)]
    assert calibration.matched(rows) is None
    assert len(calibration.tables(rows)) == 1


@pytest.mark.slow
def test_calibration_study_measures_every_epoch(tiny, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [tiny(j) | {"test": 40} for j in ordered(calibration.jobs(), [0])[:2]]
    rows = [job | calibration.run(job, str(data_dir)) for job in jobs]
    for row in rows:
        (only,) = row["epochs"]
        assert len(only["measured"]) == 31
        assert all(0 <= e <= 1 and 0 <= a <= 100 for a, e in only["measured"].values())
    calibration.picture(rows).savefig(tmp_path / "boxes.png")


@pytest.mark.parametrize("row", ["authors", "cnn"])
def test_a_long_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    tiny, data_dir, tmp_path, monkeypatch, row
):
    job = next(j for j in long.jobs() if j["task"] == row and j["algorithm"] == "ipc")
    job = tiny(job)
    job["settings"] |= {"trainer.max_epochs": 3}
    monkeypatch.setattr(long, "MODELS", tmp_path / "whole" / "models")
    whole = long.run(job, str(data_dir))

    monkeypatch.setattr(long, "MODELS", tmp_path / "stopped" / "models")
    step, begun = model.ImageClassifier.training_step, []

    def stopped(self, batch, batch_idx):
        begun.append(batch_idx)
        if len(begun) == 4:
            raise InterruptedError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(model.ImageClassifier, "training_step", stopped)
        with pytest.raises(InterruptedError):
            long.run(job, str(data_dir))
    resumed = long.run(job, str(data_dir))
    again = long.run(job, str(data_dir))  # it had ended, and its record was lost
    assert again["val"] == whole["val"]
    assert len(whole["val"]) == 3
    for figure in ("val", "test", "last_test", "diverged"):
        assert resumed[figure] == whole[figure], figure
    first, second = (
        torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.rglob("last.ckpt")
    )
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    long.tables([job | whole])
    long.picture([job | whole])


def test_batches_are_repeated_in_a_row(data_dir):
    data = MNIST(str(data_dir / "mnist"), checksums=False, val_size=VAL, batch_size=30, repeat=3)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = [images for images, _ in loader]
    assert len(loader) == len(batches) == 9
    for number in range(0, 9, 3):
        assert torch.equal(batches[number], batches[number + 1])
        assert torch.equal(batches[number], batches[number + 2])
    assert not torch.equal(batches[0], batches[3])
    with pytest.raises(ValueError, match="repeat=0"):
        MNIST(repeat=0)


def test_raw_pixels_and_all_images(data_dir):
    data = CIFAR10(str(data_dir / "cifar10"), checksums=False, val_size=0, raw=True)
    data.setup("fit")
    assert len(data.splits["train"]) == COUNTS["train"]
    assert data.splits["val"] is data.splits["test"] or torch.equal(
        data.splits["val"].tensors[0], data.splits["test"].tensors[0]
    )
    images, labels = next(iter(data.val_dataloader()))
    scaled, _ = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(scaled, images.float() / 255)


def test_squared_error_is_half_the_distance_to_the_label():
    outputs, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    by_hand = sum(
        0.5 * ((o - torch.eye(3)[n]) ** 2).sum() for o, n in zip(outputs, labels, strict=True)
    )
    torch.testing.assert_close(SquaredError("sum")(outputs, labels), by_hand)
    torch.testing.assert_close(SquaredError()(outputs, labels), by_hand / 5)
