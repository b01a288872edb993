"""The language models' recipe on a small text: batches, perplexity, every YAML, the study."""

from __future__ import annotations

import gzip
import json
import math
import re
from statistics import fmean

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_pc.cli import main as cli
from recipes.common import queue
from recipes.common.warmup import WarmUp
from recipes.language_modeling import generate, study, sweep, variants
from recipes.language_modeling.batches import IGNORED, Batches
from recipes.language_modeling.data import OneBillionWords, SmallText
from recipes.language_modeling.model import LanguageModel, load
from recipes.language_modeling.tokens import (
    BOS,
    EOS,
    MASK,
    SPECIAL,
    UNK,
    Corpus,
    Sentences,
    cut,
    make,
)
from tests.marks import mostly_slow

SMALL = {"vocabulary": 120, "hidden": 16, "intermediate": 24, "positions": 32}
ROWS = [f"{task}_{name}" for task in study.TASKS for name in study.ALGORITHMS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def small(cache, task="masked", **options):
    data = SmallText(task=task, cache_dir=cache, **options)
    data.setup("fit")
    return data


def sentences(*lengths):
    """Of ids that tell where they stand: sentence n has 100 n, 100 n + 1, .. from n = 1."""
    ids = [100 * (n + 1) + i for n, length in enumerate(lengths) for i in range(length)]
    return Sentences(np.array(ids, np.uint16), np.cumsum(lengths))


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["masked", "conditional"])
def test_every_sentence_comes_once_an_epoch_beside_others_of_its_length(task):
    lengths = [1, 5, 5, 5, 2, 30, 31, 7, 5, 5]
    loader = Batches(sentences(*lengths), task, 2, 22, 2000, seed=0)
    for _ in range(3):
        batches = list(loader)
        assert (
            len(batches) == len(loader) == 7
        )  # of 5: 3; of 1, 2, 7 and of those cut to 20: 1 each
        found = []
        for batch in batches:
            whole = torch.where(batch.targets == IGNORED, batch.ids, batch.targets)
            if task == "conditional":
                whole = torch.cat([batch.ids, batch.targets[:, -1:]], 1)
            for row in whole.tolist():
                number = (max(row[1:-1]) // 100) - 1
                length = min(lengths[number], 20)
                last = EOS if task == "masked" or lengths[number] <= 20 else IGNORED
                assert row == [BOS, *(100 * (number + 1) + i for i in range(length)), last]
                found.append(number)
        assert sorted(found) == list(range(10))


def test_conditional_targets_are_the_next_tokens():
    (batch,) = Batches(sentences(3), "conditional", 2, 22, 2000, seed=0)
    assert batch.ids.tolist() == [[BOS, 100, 101, 102]]
    assert batch.targets.tolist() == [[100, 101, 102, EOS]]


def test_masks_are_berts():
    many = Sentences(np.full(200_000, 50, np.uint16), np.arange(20, 200_001, 20))
    ids, targets = map(torch.cat, zip(*Batches(many, "masked", 128, 64, 1000, seed=0), strict=True))
    assert (targets[:, [0, -1]] == IGNORED).all()
    asked = targets != IGNORED
    assert asked.any(1).all()
    share = asked[:, 1:-1].float().mean().item()
    # 0.15, and one more of twenty where none was drawn: 0.15 + 0.85**20 / 20 = 0.152
    assert share == pytest.approx(0.152, abs=0.003)
    assert (targets[asked] == 50).all()
    read = ids[asked]
    assert (read == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (read == 50).float().mean().item() == pytest.approx(0.1, abs=0.01)
    strange = read[(read != MASK) & (read != 50)]
    assert strange.min() >= SPECIAL
    assert strange.max() < 1000
    assert len(strange.unique()) > 800


def test_a_sentence_of_one_token_is_asked_for_it():
    for batch in (*Batches(sentences(1, 1, 1), "masked", 3, 22, 2000, seed=3),):
        assert sorted(batch.targets[:, 1].tolist()) == [100, 200, 300]


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) for a, b in pairs)


def test_epochs_differ_and_evaluation_does_not(cache):
    data = small(cache, batch_size=32)
    train, dev = data.train_dataloader(), data.val_dataloader()
    one, two = list(train), list(train)
    assert not same(one, two)
    again = list(small(cache, batch_size=32).train_dataloader())
    assert same(one, again)
    assert same(list(dev), list(dev))
    other = list(small(cache, batch_size=32, seed=1).train_dataloader())
    assert not same(one, other)


def test_an_epoch_that_is_broken_off_does_not_show_in_the_next(cache):
    dev = small(cache).val_dataloader()
    first = next(iter(dev))
    assert torch.equal(next(iter(dev)).ids, first.ids)


@pytest.mark.parametrize("stop", [1, 5, "end"])
def test_a_loader_goes_on_from_where_it_was_saved(cache, stop):
    data = small(cache, batch_size=64)
    straight, whole = data.train_dataloader(), []
    for _ in range(3):
        whole.append(list(straight))
    broken = data.train_dataloader()
    list(broken)
    iterator = iter(broken)
    stop = len(broken) if stop == "end" else stop
    for _ in range(stop):
        next(iterator)
    state = broken.state_dict()
    other = data.train_dataloader()
    other.load_state_dict(state)
    expected = whole[1][stop:] if stop < len(broken) else whole[2]
    assert same(list(other), expected)


# --- text -----------------------------------------------------------------------------------------


def lines(split):
    return ["the cat sat on the mat .", "", "  ", "a dog", "x"] * 30


def test_empty_lines_are_left_out_and_strange_characters_unknown():
    corpus = make(lines, 40, 100, "here")
    assert len(corpus.splits["train"]) == 90  # 100 lines that are not empty, there are 90
    processor = corpus.tokenizer
    assert processor.decode(corpus.splits["dev"][0].tolist()) == "the cat sat on the mat ."
    assert UNK in processor.encode("a 漢 dog")
    assert len(cut(["", "a dog"], processor)) == 1
    assert processor.id_to_piece(list(range(SPECIAL)))[MASK] == "[MASK]"


def test_a_corpus_survives_its_file(tmp_path):
    corpus = make(lines, 40, 20, "here")
    corpus.save(tmp_path / "deep" / "tokens.npz")
    again = Corpus.load(tmp_path / "deep" / "tokens.npz")
    assert (again.model, again.source) == (corpus.model, "here")
    for name, split in corpus.splits.items():
        assert np.array_equal(split.ids, again.splits[name].ids)
        assert np.array_equal(split.ends, again.splits[name].ends)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokens.npz"]


def test_a_damaged_file_of_tokens_is_told(tmp_path):
    path = tmp_path / "tokens.npz"
    make(lines, 40, 20, "here").save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"tokens\.npz is not a file of tokens .* made anew"):
        Corpus.load(path)


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [
        (8001, r"No tokenizer of 8001 tokens can be made from 60 sentences: .* smaller vocabulary"),
        (5, "expected 6 to 65536"),
        (70_000, "expected 6 to 65536"),
    ],
)
def test_vocabularies_that_cannot_be(vocabulary, says):
    with pytest.raises(ValueError, match=says):
        make(lines, vocabulary, 60, "")


def test_a_split_without_sentences_is_told():
    with pytest.raises(ValueError, match="The dev split holds no sentence"):
        make(lambda split: ["", " "] if split == "dev" else lines(split), 40, 100, "")


def write(folder, **changed):
    for split in ("train", "dev", "test"):
        text = changed.get(split, "\n".join(lines(split)))
        data = text if isinstance(text, bytes) else gzip.compress(text.encode())
        (folder / f"{split}.txt.gz").write_bytes(data)


def test_files_are_read_once_and_anew_when_they_change(tmp_path):
    def words():
        options = {"sentences": 50, "vocabulary": 40, "cache_dir": str(tmp_path / "cache")}
        data = OneBillionWords(str(tmp_path), **options)
        data.setup("fit")
        return data

    write(tmp_path)
    first = words()
    stamp = first.path.stat().st_mtime_ns
    assert words().path.stat().st_mtime_ns == stamp
    write(tmp_path, dev="only one sentence")
    assert len(words().corpus.splits["dev"]) == 1
    alone = OneBillionWords(sentences=50, vocabulary=40, cache_dir=str(tmp_path / "cache"))
    alone.setup("fit")  # from the file of tokens alone
    assert len(alone.corpus.splits["dev"]) == 1


def test_bad_files_are_told(tmp_path):
    options = {"vocabulary": 40, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(FileNotFoundError, match=r"train\.txt\.gz is missing\. data_dir must hold"):
        OneBillionWords(str(tmp_path), **options).setup("fit")
    whole = gzip.compress(b"some words here\n" * 1000)
    for damaged in (whole[:-20], b"no gzip", gzip.compress(b"\xff\xfe")):
        write(tmp_path, dev=damaged)
        with pytest.raises(ValueError, match=r"dev\.txt\.gz is damaged"):
            OneBillionWords(str(tmp_path), **options).setup("fit")
    assert not (tmp_path / "cache").exists()


def test_a_download_that_fails_says_where_the_archive_is(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"statmt\.org/lm-benchmark"):
        OneBillionWords(cache_dir=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "causal"}, "task='causal': expected 'masked' or 'conditional'"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"max_tokens": 2}, "max_tokens=2: expected 3 or more"),
        ({"eval_sentences": 0}, "eval_sentences=0"),
    ],
)
def test_bad_numbers_are_told(options, says):
    with pytest.raises(ValueError, match=says):
        SmallText(**options)


# --- model ----------------------------------------------------------------------------------------


def trainer(**options):
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", **dict.fromkeys(silent, False) | options)


@pytest.mark.parametrize("task", study.TASKS)
def test_perplexity_is_that_of_the_sentences_own_tokens(cache, task):
    """Each token of the same weight, whatever batch it comes in; the end is not asked for."""
    torch.manual_seed(0)
    data = small(cache, task, eval_batch_size=7, max_tokens=32)
    model = LanguageModel(task, **SMALL)
    (found,) = trainer().validate(model, data, verbose=False)
    model.eval()
    losses = {True: [], False: []}  # of ends, of a sentence's own tokens
    for batch in data.val_dataloader():
        for ids, targets in zip(*batch, strict=True):
            logits = model.net(ids[None]).logits[0].log_softmax(-1)
            for position, target in enumerate(targets.tolist()):
                if target != IGNORED:
                    losses[target == EOS].append(-float(logits[position, target]))
    assert found["dev_perplexity"] == pytest.approx(math.exp(fmean(losses[False])), rel=1e-4)
    if task == "conditional":
        everything = math.exp(fmean(losses[False] + losses[True]))
        assert found["dev_perplexity_with_end"] == pytest.approx(everything, rel=1e-4)
        assert len(losses[True]) == 200
    else:
        assert losses[True] == []
        assert "dev_perplexity_with_end" not in found


def test_the_training_loss_is_the_mean_over_the_targets(cache):
    model = LanguageModel("conditional", **SMALL).eval()
    batch = next(iter(small(cache, "conditional").train_dataloader()))
    expected = F.cross_entropy(model.net(batch.ids).logits.flatten(0, 1), batch.targets.flatten())
    assert torch.allclose(model.training_step(batch, 0), expected)


@pytest.mark.parametrize("task", study.TASKS)
def test_what_a_position_sees(task):
    """All of the sentence, or what comes before."""
    torch.manual_seed(0)
    model = LanguageModel(task, **SMALL).eval()
    ids = torch.randint(SPECIAL, 120, (2, 9))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] - SPECIAL + 1) % 100 + SPECIAL
    changed = (model(ids) - model(other)).abs().amax((0, 2)) > 0
    expected = [True] * 9 if task == "masked" else [False] * 5 + [True] * 4
    assert changed.tolist() == expected


@pytest.mark.parametrize("layer_norm", [True, False])
def test_layer_norm_is_in_or_out(layer_norm):
    model = LanguageModel(layer_norm=layer_norm, **SMALL)
    assert any(isinstance(m, nn.LayerNorm) for m in model.modules()) == layer_norm


def test_weights_are_drawn_as_asked_for():
    """PyTorch's linear layers are uniform within 1 / sqrt(inputs): deviation 1 / sqrt(3 inputs)."""
    torch.manual_seed(0)
    for linear, deviation in (("torch", (3 * 128) ** -0.5), ("bert", 0.02)):
        net = LanguageModel(vocabulary=500, hidden=128, linear=linear, embeddings=0.3).net
        dense = net.bert.encoder.layer[1].attention.self.query
        assert dense.weight.std().item() == pytest.approx(deviation, rel=0.03)
        assert (dense.bias == 0).all() == (linear == "bert")
        assert net.cls.predictions.decoder.weight.std().item() == pytest.approx(deviation, rel=0.03)
        table = net.bert.embeddings.word_embeddings.weight
        assert table[1:].std().item() == pytest.approx(0.3, rel=0.03)
    for options, says in (
        ({"linear": "xavier"}, "expected 'torch' or"),
        ({"embeddings": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            LanguageModel(**SMALL | options)


def test_input_and_output_embeddings_are_two_matrices():
    net = LanguageModel(**SMALL).net
    assert net.bert.embeddings.word_embeddings.weight is not net.cls.predictions.decoder.weight


@pytest.mark.parametrize(
    ("data", "model", "says"),
    [
        ({"task": "conditional"}, {}, "asks for 'conditional' tokens, the model is 'masked'"),
        ({"vocabulary": 100}, {}, "tokenizer has 100 tokens, the model 120"),
        ({}, {"positions": 20}, "max_tokens=32: the model takes 20; raise its positions"),
    ],
)
def test_data_that_does_not_fit_the_model_is_told(cache, data, model, says):
    module = SmallText(cache_dir=cache, max_tokens=32, **data)
    with pytest.raises(ValueError, match=says):
        trainer().validate(LanguageModel(**SMALL | model), module)


def test_a_checkpoint_of_another_tokenizer_is_told(cache, tmp_path):
    one = SmallText(cache_dir=cache, max_tokens=32)
    other = SmallText(cache_dir=cache, max_tokens=32, sentences=300)
    options = {"limit_train_batches": 1, "limit_val_batches": 1, "max_epochs": 1}
    first = trainer(**options)
    first.fit(Trained(**SMALL), one)
    first.save_checkpoint(tmp_path / "a.ckpt")
    trainer(**options).validate(Trained(**SMALL), one, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        trainer(**options).validate(Trained(**SMALL), other, ckpt_path=tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        trainer(**options).validate(loaded, other)


class Trained(LanguageModel):
    rate = 1e-3

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate)


# --- every YAML, and what becomes of its checkpoint -----------------------------------------------

ON_SMALL_TEXT = [
    *("--data=recipes.language_modeling.data.SmallText", "--data.batch_size=32"),
    *("--data.sentences=400", "--data.eval_sentences=20", "--model.vocabulary=120"),
    *("--model.hidden=16", "--model.intermediate=24", "--trainer.max_steps=4"),
    *("--trainer.val_check_interval=2", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


@pytest.mark.parametrize("row", mostly_slow(ROWS, "masked_ipc", "conditional_pc"))
def test_every_yaml_trains(row, cache, tmp_path, capsys):
    task = row.partition("_")[0]
    run = cli(
        [
            *("fit", f"--config={study.HERE / row}.yaml", *ON_SMALL_TEXT, f"--data.task={task}"),
            *(f"--data.cache_dir={cache}", f"--trainer.default_root_dir={tmp_path}"),
        ]
    )
    assert run.trainer.global_step == 4
    assert math.isfinite(run.trainer.callback_metrics["dev_perplexity"])
    report = getattr(run.trainer.strategy, "report", None)
    if row.endswith("bp"):
        assert report is None
    elif row.endswith("ipc"):
        assert report.nodes == ["net.cls.predictions.transform"]
    else:
        assert sum("softmax" in node for node in report.nodes) == 2  # F_KL in both blocks
        assert report.nodes[-1].endswith("transform_act_fn")
        assert len(report.nodes) == 5
    path = run.trainer.checkpoint_callback.best_model_path
    capsys.readouterr()
    if task == "masked":
        generate.main([path, "the old [MASK] [MASK] a dog .", "--count=2"])
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2
        assert all(line.lstrip()[0].isdigit() and "[MASK]" not in line for line in shown)
    else:
        for _ in range(2):
            generate.main([path, "every dog", "--count=2", "--seed=3"])
        shown = capsys.readouterr().out.splitlines()
        assert shown[:2] == shown[2:]
        assert all(line.startswith("every dog") for line in shown)


def test_every_yaml_has_the_papers_settings():
    """Appendix D.3.1's best combinations, and D.3's LayerNorm but in masked iPC."""
    found = {}
    for row in ROWS:
        given = yaml.safe_load((study.HERE / f"{row}.yaml").read_text())
        strategy = given["trainer"].get("strategy", {}).get("init_args", {})
        batch_size = given["data"]["init_args"]["batch_size"]
        assert given["trainer"]["val_check_interval"] == 100 * 128 // batch_size
        assert given["trainer"]["max_epochs"] == 16
        assert given["data"]["init_args"]["task"] == given["model"]["init_args"]["task"]
        norm, rate = (
            given["model"]["init_args"]["layer_norm"],
            given["optimizer"]["init_args"]["lr"],
        )
        found[row] = (norm, batch_size, rate, strategy.get("T"), strategy.get("gamma"))
    assert found == {
        "masked_bp": (True, 256, 0.0032, None, None),
        "masked_pc": (False, 128, 0.0004, 8, 0.03125),
        "masked_ipc": (True, 128, 0.0008, 6, 0.5),
        "conditional_bp": (True, 64, 0.0016, None, None),
        "conditional_pc": (False, 128, 0.0004, 10, 0.0078125),
        "conditional_ipc": (True, 128, 0.0032, 4, 0.5),
    }


@pytest.mark.slow
def test_a_trained_model_has_learned_the_grammar(cache, tmp_path):
    """iPC, for 200 batches."""
    run = cli(
        [
            *("fit", f"--config={study.HERE / 'conditional_ipc'}.yaml", *ON_SMALL_TEXT),
            *("--data.task=conditional", "--data.sentences=2000", f"--data.cache_dir={cache}"),
            *("--model.hidden=32", "--trainer.max_steps=200", "--optimizer.lr=0.005"),
            *("--trainer.val_check_interval=50", f"--trainer.default_root_dir={tmp_path}"),
        ]
    )
    assert run.trainer.callback_metrics["dev_perplexity"] < 8
    model = load(run.trainer.checkpoint_callback.best_model_path)
    words = set(" ".join(SmallText().read("train")).split())
    for seed in range(5):
        written = generate.sample(model, "the old", seed=seed).split()
        assert written[:2] == ["the", "old"]
        assert len(written) > 4
        assert sum(word in words for word in written) >= len(written) - 1
    assert generate.sample(model, seed=1) != generate.sample(model, seed=2)
    cold = {generate.sample(model, temperature=1e-3, seed=seed) for seed in range(3)}
    assert len(cold) == 1
    with pytest.raises(ValueError, match="The start has 101 tokens, the model takes 64"):
        generate.sample(model, "dog " * 100)


def test_masks_are_filled_one_after_the_other_the_surest_first(cache):
    """A model that is sure of the second mask, and of the first once it has seen the second."""
    processor = small(cache).corpus.tokenizer
    dog, sees, old = (processor.encode(word)[0] for word in ("dog", "sees", "old"))
    seen = []

    class Model:
        task = "masked"
        net = LanguageModel(**SMALL).net
        tokenizer = small(cache).corpus.model

        def __call__(self, ids):
            seen.append(ids[0].tolist())
            blanks = [i for i, token in enumerate(seen[-1]) if token == MASK]
            logits = torch.zeros(1, ids.shape[1], 120)
            logits[0, :, [MASK, EOS]] = 99.0  # which are no words
            logits[0, blanks[-1], sees if len(blanks) > 1 else dog] = 9.0
            logits[0, blanks[0], old] = 3.0
            return logits

    found = generate.fill(Model(), "the [MASK] [MASK] .", best=2)
    assert [sentence for sentence, _ in found] == ["the dog sees .", "the old sees ."]
    assert found[0][1] > 0.9 > found[1][1]
    assert len(seen) == 2
    assert seen[1] == [
        sees if i == 2 + len(processor.encode("the")) else t for i, t in enumerate(seen[0])
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [("no mask here", r"holds no \[MASK\]"), ("the [MASK] " * 80, "the model takes 32")],
)
def test_sentences_that_cannot_be_filled_are_told(cache, text, says):
    model = LanguageModel(**SMALL).eval()
    model.tokenizer = small(cache).corpus.model
    with pytest.raises(ValueError, match=says):
        generate.fill(model, text)


def test_the_other_task_is_told(cache):
    for task, use in (("masked", generate.sample), ("conditional", generate.fill)):
        model = LanguageModel(task, **SMALL).eval()
        model.tokenizer = small(cache).corpus.model
        with pytest.raises(ValueError, match=f"The model is {task}: expected a"):
            use(model, "the [MASK] .")
    with pytest.raises(ValueError, match="task='causal': expected 'masked' or 'conditional'"):
        LanguageModel("causal", **SMALL)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "7"], "--size: expected 0, 1, 2, 3"),
        (["--processes", "0"], "--processes: expected 1 or more"),
        (["--threads", "-1"], "--threads: expected 1 or more"),
    ],
)
def test_arguments_of_a_study_that_cannot_be_are_told(tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit):
        queue.main(study.STUDY, [*arguments, "--out", str(tmp_path / "new" / "a.json")])
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_checkpoints_are_told(tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    for name, says in (("b.ckpt", "is missing"), ("a.ckpt", "is no checkpoint of a Language")):
        with pytest.raises(SystemExit):
            generate.main([str(tmp_path / name)])
        assert says in capsys.readouterr().err


# --- the study ------------------------------------------------------------------------------------


def job(cache, row="conditional_ipc", **settings):
    return {
        "size": 0,
        "row": row,
        "seed": 0,
        "settings": {
            "data": "recipes.language_modeling.data.SmallText",
            "data.task": row.partition("_")[0],
            "data.batch_size": 32,
            "data.sentences": 400,
            "data.cache_dir": cache,
            "model.vocabulary": 120,
            "model.hidden": 16,
            "model.dropout": 0.1,
            "trainer.max_steps": 20,
            "trainer.val_check_interval": 5,
            **settings,
        },
    }


def test_a_run_says_what_came_out(cache, tmp_path):
    nodes = {"trainer.strategy.init_args.value_nodes": "auto"}
    figures = study.train(job(cache, **nodes), None, tmp_path / "runs")
    assert [batches for batches, _ in figures["dev"]] == [5, 10, 15, 20]
    assert figures["best_dev"] == min(value for _, value in figures["dev"])
    assert figures["test"] < 120
    assert figures["batches"] == 20
    assert figures["seconds"] > 0
    assert [batches for batches, _ in figures["nodes"]] == [5, 10, 15, 20]
    for _, found in figures["nodes"]:
        assert len(found) == 6
        assert all(value > 0 for value in found.values())
    assert not figures["diverged"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_run_that_gets_worse_is_tested_at_its_best(cache, tmp_path):
    settings = {"trainer.max_steps": 30, "optimizer.lr": 0.3}
    settings["trainer.callbacks.init_args"] = {"batches": 0, "decay": False}
    figures = study.train(job(cache, "conditional_bp", **settings), None, tmp_path / "runs")
    curve = dict(figures["dev"])
    assert list(curve) == [5, 10, 15, 20, 25, 30]
    assert figures["batches"] == 30
    best = min(curve, key=curve.get)
    assert best < 30
    settings["trainer.max_steps"] = best
    short = study.train(job(cache, "conditional_bp", **settings), None, tmp_path / "runs")
    assert short["test"] == figures["test"]


@pytest.mark.parametrize("row", mostly_slow(["conditional_ipc", "masked_bp"], "masked_bp"))
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(cache, tmp_path, row, monkeypatch):
    whole = study.train(job(cache, row), None, tmp_path / "whole")

    class Killed(Exception):
        pass

    original = study.Record.on_train_batch_end

    def killed(self, *args):
        original(self, *args)
        if len(self.figures["seconds"]) == 17:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(study.Record, "on_train_batch_end", killed)
        with pytest.raises(Killed):
            study.train(job(cache, row), None, tmp_path / "broken")
    broken = study.train(job(cache, row), None, tmp_path / "broken")
    assert broken["batches"] == 20
    assert broken["dev"] == whole["dev"]
    assert broken["test"] == whole["test"]


def test_divergence_is_a_result(cache, tmp_path):
    settings = {"optimizer.lr": 1e30, "trainer.val_check_interval": 1}
    given = job(cache, **settings)
    figures = study.train(given, None, tmp_path)
    assert figures["diverged"]
    (table,) = study.tables([given | figures, given | figures | {"test": 90.0}])
    cells = {column.header: list(column.cells)[-1] for column in table.columns}
    assert (cells["test"], cells["s / batch"]) == ("90.0 (1 of 2)", "-")
    assert cells["converged"] == "0 of 2"
    assert study.picture([given | figures]).axes
    assert figures["test"] is None or figures["test"] > 200
    assert not study.converged({"row": "conditional_ipc", **figures})


def test_rows_converge_by_the_papers_thresholds():
    def is_converged(row, test):
        return study.converged({"row": row, "test": test, "diverged": False})

    assert is_converged("masked_bp", 199.9)
    assert not is_converged("conditional_ipc", 200)
    assert is_converged("conditional_pc", 799.9)
    assert not is_converged("masked_pc", 800)
    assert not is_converged("masked_pc", None)
    assert not study.converged({"row": "masked_bp", "test": 90.0, "diverged": True})


def test_jobs_of_one_size_learn_from_as_many_sentences():
    everything = study.jobs()
    found = [j for j in everything if "variant" not in j]
    for size in (0, 1):
        for seed in range(study.SIZES[size]["seeds"]):
            rows = {
                j["row"]: j["settings"] for j in found if (j["size"], j["seed"]) == (size, seed)
            }
            assert set(rows) == set(ROWS)
            for row, settings in rows.items():
                batches, batch_size = settings["trainer.max_steps"], settings["data.batch_size"]
                assert batches * batch_size == study.SIZES[size]["sentences"]
                assert batch_size == (16 if "masked" in row else 64)
                schedule = settings["trainer.callbacks.init_args"]
                assert schedule == {"batches": batches // 20, "decay": "ipc" in row}
    short = [j for j in found if j["size"] == 2]
    assert [j["settings"]["trainer.max_epochs"] for j in short] == [3] * 6
    assert all(j["settings"]["trainer.callbacks.init_args"]["decay"] for j in short)
    paper = [j for j in found if j["size"] == 3]
    assert len(paper) == 60
    assert all(list(j["settings"]) == ["data.seed"] for j in paper)


def test_variants_differ_from_their_rows_in_what_they_say():
    everything = study.jobs()
    variants = [j for j in everything if "variant" in j]
    assert len(variants) == 3 * 2 * len(study.VARIANTS)
    assert {study.label(j) for j in everything} == {*study.LABELS}
    rows = {(j["size"], j["row"], j["seed"]): j for j in everything if "variant" not in j}
    for variant in variants:
        row = rows[variant["size"], variant["row"], variant["seed"]]
        changed = {k for k, v in variant["settings"].items() if row["settings"].get(k) != v}
        schedule = variant["settings"]["trainer.callbacks.init_args"]
        assert schedule["decay"]
        if variant["variant"] == "all nodes":
            assert changed == {
                "trainer.strategy.init_args.value_nodes",
                *(["model.layer_norm"] if "masked" in row["row"] else []),
            }
            continue
        times = 4.5 if "long" in variant["variant"] else 1
        assert (
            variant["settings"]["trainer.max_steps"] == times * row["settings"]["trainer.max_steps"]
        )
        longer = {"trainer.max_steps", "trainer.val_check_interval"} if times > 1 else set()
        assert changed == {"trainer.callbacks.init_args", *longer}


@pytest.mark.parametrize(
    "given", [j for j in variants.jobs() if j["size"] == j["seed"] == 0], ids=lambda j: j["variant"]
)
@pytest.mark.filterwarnings("ignore")  # some of them are told that they are unsuited
@pytest.mark.slow
def test_variants_are_what_they_say(cache, tmp_path, given):
    small_text = job(cache, given["row"])["settings"]
    settings = small_text | given["settings"] | {"trainer.max_steps": 3, "data.eval_sentences": 20}
    settings |= {"model.vocabulary": 120, "data.vocabulary": 120}
    run = cli(
        [
            *("fit", f"--config={study.HERE / given['row']}.yaml", "--trainer.logger=false"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            *(f"--trainer.default_root_dir={tmp_path}", "--trainer.val_check_interval=3"),
            *(f"--{k}={v}" for k, v in settings.items() if k != "trainer.val_check_interval"),
        ]
    )
    variant = given["variant"]
    if given["set"] == "placement":
        used = run.trainer.strategy.settings
        given_rate = {
            "gamma 1": 1.0,
            "gamma 0.5 as in the paper": 0.5,
            "alone": 0.5,
            "(the recipe)": 0.5,
        }
        assert used.gamma == next((g for n, g in given_rate.items() if variant.endswith(n)), "auto")
        assert used.algorithm == ("iepc" if "iePC" in variant else "ipc")
        assert run.model.hparams.layer_norm == ("LayerNorm" in variant)
        assert used.softmax_energy == ("gaussian" if "Gaussian" in variant else "categorical")
        names = run.trainer.strategy.report.nodes
        assert any("softmax" in n for n in names) == ("auto" in variant)
        assert any("value" in n for n in names) == ("linear" in variant)
        assert any(n.endswith("layer.1") for n in names) == ("block" in variant)
        return
    if given["set"] == "initialisation":
        drawn = run.model.hparams
        assert (drawn.linear == "bert") == ("linear" in variant or "both" in variant)
        assert drawn.embeddings == (0.02 if "embeddings" in variant or "both" in variant else 0.1)
        return
    decay = re.search(r"\bdecay\b", variant) is not None
    base = 0.0016 if "half" in variant or given["set"] == "backprop" else 0.0032
    warm = 1 if "no warm-up" in variant else 3 / 30  # of 600 batches a twentieth
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        base * warm * (1 - 2 / 3 if decay else 1)
    )
    assert run.trainer.gradient_clip_val == (1.0 if "clipping" in variant else None)
    if given["set"] == "backprop":
        return
    used = run.trainer.strategy.settings
    assert used.gamma == (
        "auto" if "gamma auto" in variant else 0.1 if "gamma 0.1" in variant else 0.5
    )
    assert used.gamma_decay == (1.0 if "not decayed" in variant else 0.9)
    weight = used.precisions if isinstance(used.precisions, float) else 1.0
    assert weight == (0.1 if "weigh" in variant else 1.0)
    attention = any("softmax" in name for name in run.trainer.strategy.report.nodes)
    assert attention == variant.startswith("auto, ")


def test_variants_are_shown():
    rows = [
        given | {"dev": [[1, 9.0]], "best_dev": 9.0, "test": None, "seconds": None}
        | {"diverged": True, "batches": 1}
        for given in variants.jobs()
        if given["size"] == 0
    ]  # fmt: skip
    assert [table.row_count for table in variants.tables(rows)] == [10, 4, 12, 4]
    assert len(variants.picture(rows).axes) == 4


def test_variants_of_a_set_learn_from_the_same_sentences():
    for given in variants.jobs():
        row, fixed, changes = variants.SETS[given["set"]]
        assert given["row"] == row
        settings = given["settings"]
        assert settings["data.seed"] == given["seed"]
        sentences = settings["data.batch_size"] * settings["trainer.max_steps"]
        assert sentences == variants.SIZES[given["size"]]["sentences"]
        warm_up = settings["trainer.callbacks.init_args"]
        own = fixed | changes[given["variant"]]
        assert own.items() <= {**settings, **warm_up}.items()
        if "batches" not in changes[given["variant"]]:
            assert warm_up["batches"] == settings["trainer.max_steps"] // 20


def test_a_warm_up_raises_the_rate_and_survives_a_checkpoint(cache, tmp_path):
    class Rates(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, *args):
            self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    def fit(steps, path=None, batches=8, decay=False):
        callbacks = [WarmUp(batches, decay), rates := Rates()]
        run = trainer(max_steps=steps, callbacks=callbacks, num_sanity_val_steps=0)
        run.fit(Trained(**SMALL), SmallText(cache_dir=cache, max_tokens=32), ckpt_path=path)
        return run, rates.found

    run, first = fit(5)
    run.save_checkpoint(tmp_path / "a.ckpt")
    _, rest = fit(12, tmp_path / "a.ckpt")
    expected = [min(1.0, i / 8) * 1e-3 for i in range(1, 13)]
    assert first + rest == pytest.approx(expected)
    _, fallen = fit(8, batches=3, decay=True)
    assert fallen == pytest.approx([min(1, (i + 1) / 3) * (1 - i / 8) * 1e-3 for i in range(8)])
    again, rates = WarmUp(2), []
    for rate in (1e-3, 1e-4):
        model = Trained(**SMALL)
        model.rate = rate
        run = trainer(max_steps=3, callbacks=[again], num_sanity_val_steps=0)
        run.fit(model, SmallText(cache_dir=cache, max_tokens=32))
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-4])
    with pytest.raises(ValueError, match="batches=-1: expected 0 or more"):
        WarmUp(-1)
    with pytest.raises(MisconfigurationException, match="the fit has no end"):
        trainer(max_epochs=-1, callbacks=[WarmUp(2, decay=True)]).fit(
            Trained(**SMALL), SmallText(cache_dir=cache, max_tokens=32)
        )

    class Scheduled(Trained):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(MisconfigurationException, match="use one of them"):
        trainer(max_steps=2, callbacks=[WarmUp(2)]).fit(
            Scheduled(**SMALL), SmallText(cache_dir=cache, max_tokens=32)
        )


def test_the_sweeps_are_the_papers(cache, tmp_path):
    found = sweep.jobs()
    counts = {"masked_bp": 35, "conditional_bp": 35, "masked_pc": 96, "conditional_pc": 96}
    counts |= {"masked_ipc": 20, "conditional_ipc": 20}
    for size in (0, 1):
        for row, count in counts.items():
            combinations = [j["settings"] for j in found if (j["size"], j["row"]) == (size, row)]
            assert len({json.dumps(settings) for settings in combinations}) == count
    for given in found:
        if given["size"] == 0:
            batch = given["settings"].get("data.batch_size", 128)
            assert given["settings"]["trainer.max_steps"] * batch == 25_600
    best = [j for j in found if j["size"] == 1 and j["row"] == "conditional_pc"]
    name = "trainer.strategy.init_args."
    assert any(
        (j["settings"][f"{name}T"], j["settings"][f"{name}gamma"], j["settings"]["optimizer.lr"])
        == (10, 0.0078125, 0.0004)
        for j in best
    )
    given = next(j for j in found if j["size"] == 0 and j["row"] == "conditional_ipc")
    settings = job(cache)["settings"] | given["settings"]
    settings |= {"trainer.max_steps": 4, "trainer.val_check_interval": 2}
    figures = study.train({**given, "settings": settings}, None, tmp_path)
    rows = [given | figures, found[0] | figures | {"best_dev": None}]
    assert [table.row_count for table in sweep.tables(rows)] == [1, 1]
    assert len(sweep.picture(rows).axes) == 6
