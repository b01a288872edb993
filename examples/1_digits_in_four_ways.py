"""
Digits in four ways
===================

One network learns handwritten digits by backprop, Z-IL, PC and iPC. Model, data, batches and epochs
are the same. Accuracy, optimizer steps and processor time are not.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_pc.optim import IPC, PC, ZIL

torch.set_num_threads(1)
EPOCHS, SEEDS, BATCH = 8, 3, 64

# %%
# The data are scikit-learn's 1,797 scans of 8 x 8 pixels. A fifth of them is for the test.

pixels, digits = load_digits(return_X_y=True)
split = train_test_split(pixels / 16, digits, test_size=360, stratify=digits, random_state=0)
x, x_test, y, y_test = (torch.tensor(part) for part in split)
x, x_test = x.float(), x_test.float()

# %%
# Each way is an optimizer around AdamW, and a learning rate. iPC steps AdamW at every inference
# step, so it wants a smaller one. The rates are those of ``recipes/digits``. They were chosen for
# each way on validation images, at 40 epochs.

WAYS = {"backprop": (None, 0.015), "Z-IL": (ZIL, 0.015), "PC": (PC, 0.015), "iPC": (IPC, 0.001)}


def train(way, rate, seed):
    """After each epoch: test accuracy in percent, optimizer steps, processor seconds."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(64, 10))
    adamw = torch.optim.AdamW(net.parameters(), lr=rate)
    optimizer = way(adamw, net) if way else None
    steps, seconds, course = [], 0.0, []
    adamw.register_step_post_hook(lambda *_: steps.append(1))
    for _ in range(EPOCHS):
        start = time.process_time()
        for some in torch.randperm(len(x)).split(BATCH):
            if way:
                optimizer.step(lambda: cross_entropy(net(x[some]), y[some]))
            else:
                adamw.zero_grad()
                cross_entropy(net(x[some]), y[some]).backward()
                adamw.step()
        seconds += time.process_time() - start
        right = (net(x_test).argmax(1) == y_test).float().mean().item()
        course.append((100 * right, len(steps), seconds))
    return torch.tensor(course)


# %%
# The ways take turns, so that a busy machine slows all of them alike. The table is of the last
# epoch, over seeds. Steps are the optimizer's. Time is the processor's, in multiples of backprop's.

runs = {name: [] for name in WAYS}
for seed in range(SEEDS):
    for name, (way, rate) in WAYS.items():
        runs[name].append(train(way, rate, seed))

base = torch.stack(runs["backprop"])[:, -1, 2]
print(f"{'':9}{'accuracy, %':>12}{'steps':>7}{'time':>7}")
for name, found in runs.items():
    accuracy, steps, seconds = torch.stack(found)[:, -1].unbind(1)
    spread = f"{accuracy.mean():.1f} ± {accuracy.std():.1f}"
    print(f"{name:9}{spread:>12}{int(steps[0]):>7,}{(seconds / base).median():>7.1f}")

# %%
# Rows that differ by less than their deviations are equal. The table holds epochs equal. The
# picture holds time equal: read along a vertical line. Backprop needs the least of it. What the
# others give is learning by local errors: `Choosing an algorithm <../choosing.html>`_.

figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
for name, found in runs.items():
    accuracy, _, seconds = torch.stack(found).mean(0).unbind(1)
    ax.plot(seconds / base.mean(), accuracy, "o-", ms=3, label=name)
ax.set(xscale="log", xlabel="processor time, all of backprop's = 1", ylabel="test accuracy, %")
figure.legend(loc="outside lower center", ncols=4, frameon=False)
plt.show()
