"""
Fine-tuning with LoRA
=====================

A small BERT learns one task, and is tuned to another through LoRA adapters: by backprop, and by iPC
with one value node, at what the classifier reads. Nothing of the model or of peft is changed.
"""

import copy
import time

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from lightning_pc.optim import IPC

torch.set_num_threads(1)
torch.manual_seed(0)
TOKENS, LENGTH, EPOCHS, BATCH = 20, 8, 8, 32

# %%
# The tasks are made up: of two tokens, which comes first? The rest of a sentence is random.


def sentences(count, first, second):
    ids = torch.randint(10, TOKENS, (count, LENGTH))
    places = torch.rand(count, LENGTH).argsort(1)[:, :2]
    ids.scatter_(1, places, torch.tensor([first, second]).expand(count, 2))
    return ids, (places[:, 0] < places[:, 1]).long()


@torch.no_grad()
def accuracy(net, ids, labels):
    return 100 * (net(ids).logits.argmax(1) == labels).float().mean().item()


def learn(net, optimizer, ids, labels):
    def closure():
        optimizer.zero_grad()
        loss = net(ids, labels=labels).loss
        if not isinstance(optimizer, IPC):
            loss.backward()
        return loss

    optimizer.step(closure)


# %%
# BERT learns the first task with all its weights, by backprop. The second asks about other tokens.

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
sizes |= {"vocab_size": TOKENS, "max_position_embeddings": LENGTH, "num_attention_heads": 4}
sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
bert = BertForSequenceClassification(BertConfig(**sizes))
adamw = torch.optim.AdamW(bert.parameters(), lr=2e-3)
for _ in range(200):
    learn(bert, adamw, *sentences(64, 1, 2))
(ids, labels), test = sentences(320, 3, 4), sentences(1000, 3, 4)
print(f"second task, not yet tuned: {accuracy(bert, *test):.1f} %")

# %%
# peft puts adapters into the linear layers and freezes the rest. iPC is the line that changes. It
# takes T optimizer steps a batch, so both ways are tried at two learning rates.

runs = [(way, rate) for way in ("backprop", "iPC") for rate in (1e-3, 3e-3)]
figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
for (way, rate), style in zip(runs, ("C0o--", "C0o-", "C1o--", "C1o-"), strict=True):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    net, course, start = get_peft_model(copy.deepcopy(bert), lora), [], time.process_time()
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=rate)
    if way == "iPC":
        optimizer = IPC(optimizer, net, T=4, value_nodes=[r".*\.pooler"])
    for _ in range(EPOCHS):
        for some in torch.randperm(len(ids)).split(BATCH):
            learn(net, optimizer, ids[some], labels[some])
        course.append(accuracy(net, *test))
    print(f"{way:8} at {rate:g}: {course[-1]:.1f} % in {time.process_time() - start:.1f} seconds")
    ax.plot(range(1, EPOCHS + 1), course, style, ms=4, label=f"{way}, {rate:g}")
ax.set(xlabel="epoch", ylabel="test accuracy, %")
figure.legend(loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %%
# The adapters merge into a plain BERT: `Fine-tuning <../guides/fine_tuning.html>`_.

merged = net.merge_and_unload()
print(f"{type(merged).__name__}, merged: {accuracy(merged, *test):.1f} %")
