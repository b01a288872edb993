"""Fine-tuning: what learns, what stays, and that plain transformers loads what comes out."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
)

from lightning_pc import PCStrategy, describe
from lightning_pc.cli import main as cli
from recipes.fine_tuning import study
from recipes.fine_tuning.data import AS_WRITTEN, Padded, WordOrder
from recipes.fine_tuning.model import FineTuned, blocks, freeze
from recipes.language_modeling.data import SmallText
from recipes.language_modeling.export import export, fast_tokenizer
from recipes.language_modeling.model import LanguageModel
from tests.marks import mostly_slow


def language_model(folder, **options):
    data = SmallText(cache_dir=str(folder))
    data.setup("fit")
    torch.manual_seed(0)
    sizes = {"vocabulary": 120, "hidden": 16, "intermediate": 24, "blocks": 3}
    model = LanguageModel(**sizes | options)
    model.tokenizer = data.corpus.model
    return model.eval(), data


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    export(language_model(folder)[0], folder / "bert")
    return str(folder / "bert")


# --- export ---------------------------------------------------------------------------------------


def test_an_exported_model_says_the_same(tmp_path):
    model, data = language_model(tmp_path)
    export(model, tmp_path / "bert")
    net = AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(net(batch.ids).logits, model(batch.ids))


def test_the_exported_tokenizer_cuts_like_sentencepiece(tmp_path):
    model, data = language_model(tmp_path)
    fast, processor = fast_tokenizer(model), data.corpus.tokenizer
    for line in [
        *data.read("test"),
        "  two  blanks ",
        "x \ufffd y",
        "a\tb\u200bc",
        "ﬁve",
        "a 漢字 dog",
    ]:
        ids = fast(line)["input_ids"]
        assert ids == [2, *processor.encode(line), 3]
        if 1 not in ids:
            assert fast.decode(ids, skip_special_tokens=True) == processor.decode(ids[1:-1])
    assert fast("the [MASK] .")["input_ids"][2:-2].count(fast.mask_token_id) == 1


def test_a_model_without_layer_norm_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="train it with layer_norm: true"):
        export(language_model(tmp_path, layer_norm=False)[0], tmp_path / "bert")
    assert not (tmp_path / "bert").exists()


# --- data -----------------------------------------------------------------------------------------


def test_half_of_the_sentences_are_shuffled(pretrained):
    data = WordOrder(pretrained, "small", train=400, test=100, batch_size=16)
    data.setup("fit")
    originals = {split: set(SmallText().read(split)) for split in ("train", "dev", "test")}
    bags = {
        split: [(w[0], sorted(w), w[-1]) for w in map(str.split, lines)]
        for split, lines in originals.items()
    }
    for split, loader in (
        ("train", data.train_dataloader()),
        ("dev", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        count = as_written = 0
        for batch in loader:
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            for text, label in zip(texts, batch["labels"].tolist(), strict=True):
                assert (text in originals[split]) == (label == AS_WRITTEN)
                words = text.split()
                assert (words[0], sorted(words), words[-1]) in bags[split]
                count, as_written = count + 1, as_written + label
        assert count == data.counts[split]
        assert 0.35 < as_written / count < 0.65


def test_batches_are_padded_little_and_come_in_another_order(pretrained):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    encoded = [[2, *[7] * n, 3] for n in range(1, 41)]
    loader = Padded(encoded, [0] * 40, tokenizer, 8, seed=0)
    one, two = ([b["input_ids"].shape[1] for b in loader] for _ in range(2))
    assert sorted(one) == sorted(two) == [10, 18, 26, 34, 42]
    assert one != two
    fixed = Padded(encoded, [0] * 40, tokenizer, 8, seed=None)
    assert [b["input_ids"].shape[1] for b in fixed] == [10, 18, 26, 34, 42]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": 0}, "train=0: expected 1 or more"),
        ({"test": -5}, "test=-5: expected 1 or more"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"max_tokens": 2}, "max_tokens=2: expected 3 or more"),
    ],
)
def test_numbers_of_the_data_that_cannot_be_are_told(options, says):
    with pytest.raises(ValueError, match=says):
        WordOrder("anything", "small", **options)


def test_too_few_sentences_are_told(pretrained):
    with pytest.raises(
        ValueError,
        match="200 sentences that can be shuffled, not 300: pass a smaller test",
    ):
        WordOrder(pretrained, "small", train=100, test=300).setup("fit")


# --- training -------------------------------------------------------------------------------------


def logits(net, batch):
    return net.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def train(pretrained, tmp_path, *more, yaml="ipc"):
    return cli(
        [
            *("fit", f"--config=recipes/fine_tuning/{yaml}.yaml"),
            *(f"--model.checkpoint={pretrained}", f"--data.checkpoint={pretrained}"),
            *("--data.data_dir=small", "--data.train=128", "--data.test=40"),
            *("--trainer.max_epochs=2", "--trainer.logger=false", "--optimizer.lr=0.003"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            *(f"--trainer.default_root_dir={tmp_path}", *more),
        ]
    )


@pytest.mark.parametrize("yaml", mostly_slow(["bp", "ipc", "epc", "iepc"], "ipc"))
@pytest.mark.parametrize("trained", mostly_slow(["all", "1", "lora"], "all", "lora"))
def test_what_is_trained_moves_and_is_loaded_by_plain_transformers(
    pretrained, tmp_path, trained, yaml
):
    if trained == "lora":
        pytest.importorskip("peft")
    out = tmp_path / "out"
    run = train(
        pretrained, tmp_path, f"--model.trained={trained}", f"--model.save_to={out}", yaml=yaml
    )
    batch = next(iter(run.datamodule.test_dataloader()))
    net = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.allclose(logits(net, batch), logits(run.model.net, batch), atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("the dog")["input_ids"][0] == 2
    before = AutoModelForSequenceClassification.from_pretrained(pretrained).state_dict()
    moved = {
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    layers = {f"encoder.layer.{i}" for i in range(3) if any(f"layer.{i}." in n for n in moved)}
    embeddings = any("embeddings.word" in name for name in moved)
    if trained == "1":
        assert layers == {"encoder.layer.2"}
        assert not embeddings
    else:
        assert layers == {f"encoder.layer.{i}" for i in range(3)}
        assert embeddings == (trained == "all")
    assert any("classifier" in name for name in moved)


@pytest.mark.slow
def test_a_masked_language_model_goes_on_learning(pretrained):
    class Model(FineTuned):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    ids = torch.randint(5, 120, (8, 9))
    batches = [{"input_ids": ids, "labels": ids}] * 40
    model = Model(pretrained, task="masked")
    before = model.net(**batches[0]).loss.item()
    L.Trainer(
        max_epochs=1, strategy=PCStrategy("ipc"), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, DataLoader(batches, batch_size=None))  # fmt: skip
    assert model.net(**batches[0]).loss.item() < 0.9 * before


def test_from_scratch_is_the_same_model_with_other_weights(pretrained):
    one, other = FineTuned(pretrained), FineTuned(pretrained, pretrained=False)
    assert one.net.config.to_dict().keys() == other.net.config.to_dict().keys()
    shapes = [[(n, p.shape) for n, p in m.net.named_parameters()] for m in (one, other)]
    assert shapes[0] == shapes[1]
    weights = [m.net.bert.embeddings.word_embeddings.weight for m in (one, other)]
    assert not torch.equal(*weights)
    assert one.net.training
    assert other.net.training


@pytest.mark.parametrize("last", [0, 1, 2])
def test_blocks_are_found_in_other_architectures(last):
    net = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=1, n_positions=16)
    )
    freeze(net, last)
    free = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in free if ".h." in n} == {str(i) for i in range(2 - last, 2)}
    assert "score.weight" in free
    assert "transformer.ln_f.weight" in free
    assert "transformer.wte.weight" not in free
    assert len(blocks(net)) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "clasification"}, "task='clasification': expected one of 'classification'"),
        ({"trained": 4}, r"trained=4: expected 'all', 'lora' or a number of last blocks, 0 to 3"),
        ({"trained": "some"}, "trained='some': expected 'all', 'lora'"),
        ({"trained": -1}, "trained=-1"),
    ],
)
def test_bad_arguments_are_told(pretrained, options, says):
    with pytest.raises(ValueError, match=says):
        FineTuned(pretrained, **options)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        FineTuned(str(tmp_path))


def test_a_model_without_blocks_is_told():
    class Flat(nn.Module):
        pass

    with pytest.raises(ValueError, match="Flat has no single list"):
        blocks(Flat())
    bart = BartForSequenceClassification(
        BartConfig(vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2,
                   encoder_attention_heads=1, decoder_attention_heads=1)
    )  # fmt: skip
    with pytest.raises(ValueError, match="no single list of two or more blocks: pass trained"):
        freeze(bart, 1)


def test_data_that_does_not_fit_the_model_is_told(pretrained, tmp_path):
    small = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=8, num_hidden_layers=2, num_attention_heads=1,
                   intermediate_size=8, max_position_embeddings=64)
    )  # fmt: skip
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="tokenizer has 120 tokens, the model knows 100"):
        train(pretrained, tmp_path, f"--model.checkpoint={tmp_path / 'small'}")
    with pytest.raises(ValueError, match="max_tokens=65: the model takes 64"):
        train(pretrained, tmp_path, "--data.max_tokens=65")


def test_a_model_that_reads_from_left_to_right_is_no_classifier(tmp_path):
    model, _ = language_model(tmp_path, task="conditional")
    export(model, tmp_path / "bert")
    with pytest.raises(ValueError, match="take a masked model"):
        FineTuned(str(tmp_path / "bert"))


def test_adapters_can_be_tested_after_they_were_saved(pretrained, tmp_path):
    pytest.importorskip("peft")
    out = f"--model.save_to={tmp_path / 'out'}"
    run = train(pretrained, tmp_path, "--model.trained=lora", out)
    path = run.trainer.checkpoint_callback.best_model_path
    assert run.trainer.test(run.model, run.datamodule, ckpt_path=path, verbose=False)


# --- the study ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_study_fine_tunes_one_model_in_every_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        **dict.fromkeys(("model.vocabulary", "data.vocabulary"), 120),
        **{"model.hidden": 16, "model.intermediate": 24, "model.positions": 64},
        **{"data": "recipes.language_modeling.data.SmallText", "data.batch_size": 64},
        **{"trainer.max_steps": 20, "trainer.val_check_interval": 10, "optimizer.lr": 0.01},
    }
    monkeypatch.setitem(study.PRETRAINING, "settings", settings)
    few = {"data.train": 64, "data.test": 64, "trainer.max_epochs": 1}
    few["data.data_dir"] = "small"
    rows = []
    for given in study.jobs():
        rate = study.ROWS[given["row"]].rates[0]
        if given["size"] == given["seed"] == 0 and given["lr"] == rate:
            changed = given | {"settings": given["settings"] | few}
            rows.append(given | study.run(changed, None))
    assert {(row["row"], row["algorithm"]) for row in rows} == {
        (row, algorithm) for row, how in study.ROWS.items() for algorithm in how.algorithms
    }
    for row in rows:
        assert not row["diverged"]
        assert 0 < row["dev"] < 100
        assert row["test"] * 0.64 == pytest.approx(round(row["test"] * 0.64), abs=0.01)  # of 64
    (folder,) = (path for path in study.CACHE.iterdir() if path.is_dir() and path.name != "runs")
    embeddings = {}
    for name in ("pretrained", "untrained"):
        net = AutoModelForMaskedLM.from_pretrained(folder / name)
        embeddings[name] = net.get_input_embeddings().weight
    assert not torch.equal(*embeddings.values())
    assert study.starts(None) == folder
    monkeypatch.setitem(study.PRETRAINING, "seed", 1)
    assert study.starts(None) != folder
    assert study.tables(rows)[0].row_count == len(rows)
    assert len(study.picture(rows).axes[0].patches) == len(rows)


@pytest.mark.parametrize(
    ("config", "node"),
    [
        (BertConfig, "net.bert.pooler"),
        (DistilBertConfig, "net.pre_classifier"),
        (RobertaConfig, "net.classifier.dense"),
    ],
)
def test_the_recipe_places_one_node_at_what_the_classifier_reads(config, node, tmp_path):
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    names = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    if config is DistilBertConfig:
        sizes = {names.get(name, name): size for name, size in sizes.items()}
    config(**sizes).save_pretrained(tmp_path)
    model = FineTuned(str(tmp_path), pretrained=False)
    strategy = yaml.safe_load(Path("recipes/fine_tuning/ipc.yaml").read_text())["trainer"][
        "strategy"
    ]
    batch = {"input_ids": torch.randint(3, 30, (2, 5)), "labels": torch.tensor([0, 1])}
    found = describe(
        model, batch, value_nodes=strategy["init_args"]["value_nodes"], print_table=False
    )
    assert [row.name for row in found.rows] == [node]


def test_dev_accuracy_chooses_the_learning_rate():
    given = [job for job in study.jobs() if job["size"] == 0 and job["row"] == "LoRA"]
    rows = [
        job | {"dev": 60 + 100 * job["lr"] * (-1) ** (job["algorithm"] == "ipc"), "test": 1.0}
        for job in given
    ]
    chosen = study.best(rows)
    assert {name: {r["lr"] for r in found} for (_, name), found in chosen.items()} == {
        "bp": {0.004},
        "ipc": {0.001},
    }
    assert all(len(found) == study.SIZES[0]["seeds"] for found in chosen.values())
    partly = [row for row in rows if row["seed"] == 0 or row["lr"] == 0.001]
    for found in study.best(partly).values():
        assert {row["lr"] for row in found} == {0.001}  # run with both seeds
