"""The Trainer of transformers: equal to it for Z-IL, to the wrappers for the others."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from lightning_pc.errors import ClosureError, ConfigError, DivergenceError, PCError
from lightning_pc.hugging_face import PCMixin, PCTrainer
from lightning_pc.optim import IPC, PC
from tests.engine.tiny import STILL, bert

WORDS, LENGTH = 40, 8
POOLER = ["bert.pooler.activation"]
#: Adam divides gradients that are nothing but rounding by 1e-8.
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


def dropping(**config):
    torch.manual_seed(0)
    return bert(num_hidden_layers=1, max_position_embeddings=LENGTH, **config).double()


def still():
    return dropping(**STILL)


def gpt():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": WORDS}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**size, **dropouts)).double()


def sentences(count=24, language=False):
    """Some of a label's own words; of language models the words are the labels, some left out."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        words = torch.randint(0, WORDS, (LENGTH,), generator=generator)
        words[0] = label = number % 3
        labels = words.clone() if language else torch.tensor(label)
        if language:
            labels[: number % LENGTH] = -100  # rows differ in how many words count
        found.append({"input_ids": words, "labels": labels})
    return found


def arguments(folder, **settings):
    usual = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    usual |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 2}
    return TrainingArguments(str(folder), **usual | {"save_strategy": "no"} | settings)


def trained(kind, model, folder, data=None, given=None, **settings):
    made = kind(
        model, arguments(folder, **given or {}), train_dataset=data or sentences(), **settings
    )
    made.train()
    return made


def same(model, other, **tolerance):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_grad_norm": 0.1},
        {"gradient_accumulation_steps": 4},  # 24 sentences of 4: the second update has 2 batches
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"optim": "sgd", "learning_rate": 0.5},
    ],
    ids=lambda given: "-".join(given) or "plain",
)
@pytest.mark.parametrize("make", [still, gpt])
@pytest.mark.filterwarnings("ignore:Cannot read off the training loss")  # of smoothed labels
def test_zil_is_the_trainer_itself(make, given, tmp_path):
    """Losses of language models are divided by the words of all batches of an update."""
    data = sentences(language=make is gpt)
    plain = trained(Trainer, make(), tmp_path, data, given)
    nodes = POOLER if make is still else ["transformer.ln_f"]
    mine = trained(PCTrainer, make(), tmp_path, data, given, algorithm="zil", value_nodes=nodes)
    assert mine.report.peak_energy[POOLER[0] if make is still else nodes[0]] > 0
    same(mine.model, plain.model, **CLOSE)
    for old, new in zip(plain.state.log_history, mine.state.log_history, strict=True):
        for key in {"loss", "grad_norm"} & old.keys():
            assert new[key] == pytest.approx(old[key], rel=1e-6)
    assert "pc/energy" in mine.state.log_history[0]


def test_bf16(tmp_path):
    """Under autocast values and energies are float32, and losses agree to bfloat16's digits."""
    given = {"bf16": True, "max_steps": 4, "learning_rate": 1e-3}
    plain = trained(Trainer, still().float(), tmp_path, given=given)
    zil = {"algorithm": "zil", "value_nodes": POOLER}
    mine = trained(PCTrainer, still().float(), tmp_path, given=given, **zil)
    for old, new in zip(plain.state.log_history, mine.state.log_history, strict=True):
        if "loss" in old:
            assert new["loss"] == pytest.approx(old["loss"], rel=2**-7)
    ipc = trained(PCTrainer, still().float(), tmp_path, given=given, algorithm="ipc", T=6)
    assert ipc.report.energies.dtype is torch.float32
    assert {value.dtype for value in ipc.values.values()} == {torch.float32}
    assert min(ipc.report.peak_energy.values()) > 0


@pytest.mark.parametrize("wrapper", [IPC, PC])
def test_equals_the_wrapper_with_clipping_at_each_step(wrapper, tmp_path):
    order = [
        {k: torch.stack([s[k] for s in sentences()[i : i + 4]]) for k in sentences()[0]}
        for i in range(0, 20, 4)
    ]

    class InOrder(PCTrainer):
        def get_train_dataloader(self):
            return order

    settings = {"T": 5, "gamma": 0.2}
    given = {"max_steps": 5, "max_grad_norm": 0.05, "lr_scheduler_type": "constant"}
    mine = trained(InOrder, still(), tmp_path, given=given, algorithm=wrapper.algorithm, **settings)

    model = still().train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer = wrapper(adamw, model, **settings)

    def clip(*_):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    adamw.register_step_pre_hook(clip)
    for batch in order:
        optimizer.step(lambda batch=batch: model(**batch).loss)
    same(mine.model, model, **CLOSE)
    assert mine.state.global_step == 5
    updates = 5 if wrapper is IPC else 1
    assert mine.optimizer.state[mine.model.classifier.bias]["step"] == 5 * updates


def test_resumes_to_the_bit_with_the_automatic_gamma(tmp_path):
    """With dropout, so that generators count as well."""
    often = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = trained(PCTrainer, dropping(), tmp_path / "whole", given=often, algorithm="ipc")
    again = PCTrainer(
        dropping(),
        arguments(tmp_path / "again", **often),
        train_dataset=sentences(),
        algorithm="ipc",
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    same(again.model, whole.model, rtol=0, atol=0)
    assert again.report.gamma == whole.report.gamma
    assert again.state.global_step == 8
    saved = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert "gamma" in str(saved["lightning_pc"])


def test_a_second_train_goes_on(tmp_path):
    made = trained(PCTrainer, still(), tmp_path, algorithm="pc", T=4)
    before = copy.deepcopy(made.model)
    made.train()
    assert not torch.equal(before.classifier.weight, made.model.classifier.weight)


def test_the_users_own_compute_loss_counts_and_evaluation_is_plain(tmp_path):
    class Mine(PCMixin, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            seen.append(model.training)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(3 * outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    seen = []
    made = trained(Mine, still(), tmp_path, algorithm="ipc", T=4, gamma=0.1)
    assert seen == [True] * 10
    assert made.report.loss_terms == 4
    assert min(made.report.peak_energy.values()) > 0
    weights = copy.deepcopy(made.model)
    assert "eval_loss" in made.evaluate(sentences(8))
    assert made.predict(sentences(8)).predictions.shape == (8, 3)
    same(made.model, weights, rtol=0, atol=0)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    model = peft.get_peft_model(still(), config)
    before = copy.deepcopy(dict(model.named_parameters()))
    made = trained(PCTrainer, model, tmp_path, algorithm="ipc", T=6, gamma=0.1)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    assert min(made.report.peak_energy.values()) > 0


@pytest.mark.parametrize(
    ("given", "settings", "told"),
    [
        ({}, {"gama": 0.1}, r"PCTrainer has no argument gama=. Did you mean gamma=\?"),
        ({}, {"eval_datset": []}, r"no argument eval_datset=. Did you mean eval_dataset=\?"),
        ({}, {"algorithm": "ipcc"}, "expected"),
        ({}, {"algorithm": "ipc", "T": 0}, "T=0"),
        ({"gradient_accumulation_steps": 2}, {"algorithm": "ipc"}, "accumulates nothing"),
        ({"torch_compile": True}, {}, "torch_compile hides"),
        ({}, {"algorithm": "ipc", "value_nodes": ["bert.poller"]}, "bert.poller"),
    ],
)
def test_refusals(given, settings, told, tmp_path):
    model = still()
    before = copy.deepcopy(model)
    with pytest.raises(PCError, match=told):
        trained(PCTrainer, model, tmp_path, given=given, **settings)
    same(model, before, rtol=0, atol=0)


def test_accumulation_that_is_set_later_is_refused(tmp_path):
    made = PCTrainer(still(), arguments(tmp_path), train_dataset=sentences(), algorithm="ipc")
    made.args.gradient_accumulation_steps = 2
    with pytest.raises(ConfigError, match="accumulates nothing"):
        made.train()


def test_backprop_by_accident_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"PCMixin must stand before .* class Late\(PCMixin"):

        class Late(Trainer, PCMixin):
            pass

    class Own(PCTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(ClosureError, match=r"Own.training_step has run backprop"):
        trained(Own, still(), tmp_path)
    model = still()
    ipc = IPC(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(ConfigError, match="twice"):
        trained(PCTrainer, model, tmp_path, optimizers=(ipc, None))


def test_a_compute_loss_of_the_instance_counts_each_time(tmp_path):
    made = PCTrainer(still(), arguments(tmp_path), train_dataset=sentences(), algorithm="pc", T=3)
    seen, whole = [], made.compute_loss
    made.compute_loss = lambda *given, **named: seen.append(1) or whole(*given, **named)
    made.train()
    assert len(seen) == 10


def test_an_optimizer_made_by_a_subclass_alone(tmp_path):
    class Own(PCTrainer):
        def create_optimizer(self):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    made = trained(Own, still(), tmp_path, algorithm="ipc", T=4, gamma=0.1)
    assert min(made.report.peak_energy.values()) > 0
    optimizer = made.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks  # nothing of ours is left
    assert not optimizer._optimizer_state_dict_post_hooks


def test_several_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="found 2 devices for one process"):
        PCTrainer(still(), arguments(tmp_path), train_dataset=sentences())


def test_a_divergence_is_an_error_and_leaves_a_plain_module(tmp_path):
    model = still()
    with pytest.raises(DivergenceError):
        trained(PCTrainer, model, tmp_path, algorithm="pc", gamma=1e4, T=40)
    trained(Trainer, model, tmp_path)
