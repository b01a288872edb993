"""
Predictive coding against backprop on your own model
====================================================

A template for your model and your data. All ways get the same tuning: rates, epochs, images.
"""

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_pc.optim import PredictiveCoding

torch.set_num_threads(1)

# %%
# **Replace this**: what makes the model; three sets, to learn from, to choose the learning rate by,
# and to test the choice; the loss; and what tells how good a model is, here in percent.


def make():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


pixels, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8)[order], torch.tensor(digits)[order]
train, val, test = zip(x.split([500, 500, 797]), y.split([500, 500, 797]), strict=True)
loss_of = cross_entropy


@torch.no_grad()
def accuracy(net, data):
    return 100 * (net.eval()(data[0]).argmax(1) == data[1]).float().mean().item()


# %%
# The ways and the learning rates. ``auto`` is the default of the package. ``ipc`` takes T optimizer
# steps a batch, so its best rate is often a smaller one.

WAYS, RATES, EPOCHS, BATCH = ("backprop", "auto", "ipc"), (3e-3, 1e-2, 3e-2, 1e-1), 5, 50
seconds = {way: [] for way in WAYS}


def learn(way, rate, seed):
    torch.manual_seed(seed)
    net, start = make(), time.process_time()
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    optimizer = adam if way == "backprop" else PredictiveCoding(adam, net, algorithm=way)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(train[0])).split(BATCH):

            def closure():
                adam.zero_grad()
                loss = loss_of(net(train[0][some]), train[1][some])
                if way == "backprop":
                    loss.backward()
                return loss

            optimizer.step(closure)
    seconds[way].append(time.process_time() - start)
    return net


# %%
# One seed chooses the rate, three others test it. If a best rate stands at an edge of the grid, the
# grid is too narrow and the comparison is not yet fair. Equal epochs are not equal time. Before you
# prefer a way that takes longer, give the others more epochs.

figure, ax = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
print(f"{'':9}{'rate':>6}{'val, %':>8}{'test, %':>12}{'time':>6}")
for way in WAYS:
    tried = [accuracy(learn(way, rate, 0), val) for rate in RATES]
    best = RATES[tried.index(max(tried))]
    tested = torch.tensor([accuracy(learn(way, best, seed), test) for seed in (1, 2, 3)])
    spread = f"{tested.mean():.1f} ± {tested.std():.1f}"
    cost = min(seconds[way]) / min(seconds["backprop"])  # of one run
    print(f"{way:9}{best:>6g}{max(tried):>8.1f}{spread:>12}{cost:>6.1f}")
    ax.plot(RATES, tried, "o-", ms=4, label=way)
ax.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.show()
