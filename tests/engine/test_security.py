"""Files of others are data: nothing in them runs; and training asks for no network."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_pc import PCStrategy
from lightning_pc.cli import main as cli_main
from recipes.image_classification import evaluate
from recipes.language_modeling import export
from tests.engine.lightning_problems import Module, data, loader

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("lightning_pc", "recipes") for path in (ROOT / folder).rglob("*.py")]
#: What runs whatever a file says.
RUNS = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "os.system"}


def called(path: Path):
    """Each call: its dotted name, and the arguments given by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_a_file_says(path):
    for name, given in called(path):
        assert name not in RUNS, name
        assert given.get("trust_remote_code", "False") == "False"
        assert given.get("allow_pickle", "False") == "False"
        if name == "torch.load":
            assert given["weights_only"] == "True"


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def poisoned(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint that makes a folder where all of it is unpickled, and that folder."""
    file, folder = tmp_path / "given.ckpt", tmp_path / "made"
    torch.save({"state_dict": Module().state_dict(), "hyper_parameters": Payload(folder)}, file)
    return file, folder


def test_a_recipe_takes_weights_alone_from_a_checkpoint(tmp_path):
    file, folder = poisoned(tmp_path)
    config = ROOT / "recipes" / "image_classification" / "mnist" / "bp.yaml"
    with pytest.raises(Exception, match=r"[Ww]eights"):
        evaluate.main([str(file), str(tmp_path / "out"), "-c", str(config)])
    with pytest.raises((Exception, SystemExit)):
        export.main([str(file), str(tmp_path / "out")])
    assert not folder.exists()
    torch.load(file, weights_only=False)
    assert folder.exists()


def test_a_resumed_run_takes_no_more(tmp_path):
    """Ours are plain types: they resume where nothing but weights is let in."""
    file, folder = poisoned(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(epochs):
        strategy = PCStrategy("ipc")
        return L.Trainer(max_epochs=epochs, strategy=strategy, accelerator="cpu", **quiet)

    with pytest.raises(Exception, match=r"[Ww]eights"):
        trainer(1).fit(Module(), loader(data()), ckpt_path=str(file), weights_only=True)
    assert not folder.exists()
    whole = trainer(1)
    whole.fit(Module(), loader(data()))
    whole.save_checkpoint(tmp_path / "ours.ckpt")
    again = trainer(2)
    again.fit(Module(), loader(data()), ckpt_path=str(tmp_path / "ours.ckpt"), weights_only=True)
    assert again.current_epoch == 2


def test_a_yaml_makes_what_a_class_path_names_and_runs_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "made"
    text = f"trainer: !!python/object/apply:os.mkdir ['{folder}']\n"
    (tmp_path / "given.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["lightning_pc"])
    with pytest.raises((Exception, SystemExit)):
        cli_main(["fit", "-c", str(tmp_path / "given.yaml")])
    assert not folder.exists()


def test_training_needs_no_network(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, strategy=PCStrategy("ipc"), accelerator="cpu", **quiet)
    trainer.fit(Module(), loader(data()))
