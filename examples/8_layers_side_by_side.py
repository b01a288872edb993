"""
Layers side by side
===================

In predictive coding no layer waits for another within an inference step. So equal layers can run as
one batched product, with ``parallel=True``. How long does an update take, against backprop?
"""

import time
from functools import partial
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import nn

from lightning_pc.optim import IPC

torch.set_num_threads(1)
torch.set_flush_denormal(True)  # in deep nets errors begin so small that processors are slow
DEPTHS, WIDTH, UPDATES, ROUNDS = (4, 8, 16), 64, 32, 5

# %%
# Tanh layers, one data point, plain SGD. iPC keeps its values from call to call, and updates all
# weights at each of ``UPDATES`` inference steps. Backprop makes as many updates.

x, y = torch.randn(2, 1, WIDTH)


def network(depth):
    torch.manual_seed(0)
    layers = [module for _ in range(depth) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def loss_of(net):
    return 0.5 * (net(x) - y).square().sum()


def backprop(net):
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)

    def learn():
        for _ in range(UPDATES):
            sgd.zero_grad()
            loss_of(net).backward()
            sgd.step()

    return learn


def ipc(net, parallel):
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    how = {"reset": "never", "T": UPDATES, "gamma": 0.5, "loss_terms": 1, "parallel": parallel}
    return partial(IPC(sgd, net, **how).step, lambda: loss_of(net))


# %%
# The ways take turns. Measured is processor time of one thread. A ratio is taken within each round,
# so that a busy machine slows all alike. The figures are this machine's, and yours may differ.


def seconds(learn):
    start = time.process_time()
    learn()
    return time.process_time() - start


ratios = {"one after the other": [], "side by side": []}
for depth in DEPTHS:
    ways = [backprop(network(depth)), ipc(network(depth), False), ipc(network(depth), True)]
    for learn in ways * 2:  # the first calls record and stack
        learn()
    rounds = [[seconds(learn) for learn in ways] for _ in range(ROUNDS)]
    for column, found in enumerate(ratios.values(), 1):
        found.append(median(times[column] / times[0] for times in rounds))

for name, found in {"layers": DEPTHS, **ratios}.items():
    print(f"{name:19}" + "".join(f"{number:>6.3g}" for number in found))

# %%
# Below the dashed line iPC takes less time than backprop. More: `Speed <../guides/speed.html>`_.

figure, ax = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
for name, found in ratios.items():
    ax.plot(DEPTHS, found, "o-", label=name)
ax.axhline(1, color="k", ls="--", lw=1)
ax.set(xlabel="layers", ylabel="time of an update, backprop = 1", xticks=DEPTHS, ylim=(0, None))
figure.legend(loc="outside lower center", ncols=2, frameon=False)
plt.show()
