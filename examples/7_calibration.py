"""
Calibration of iPC and of backprop
==================================

Where a model says 80 %, is it right in 80 of 100 cases? The same network is trained by backprop and
by iPC, and asked about digits with noise, which it has not learned.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_pc.metrics import AdaptiveCalibrationError
from lightning_pc.optim import IPC

torch.set_num_threads(1)
EPOCHS, SEEDS, BATCH, NOISES = 10, 3, 50, (0.0, 0.2, 0.4)

# %%
# Pixels lie between 0 and 1. The noise is Gaussian, with the deviations of ``NOISES``.

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
x, y = torch.tensor(pixels / 16).float()[order], torch.tensor(digits)[order]
(x, test), (y, labels) = x.split([1000, 797]), y.split([1000, 797])
noisy = {noise: test + noise * torch.randn_like(test) for noise in NOISES}

# %%
# iPC steps the optimizer at every inference step, so its learning rate is smaller.


def train(way, seed):
    """A trained network."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(64, 10))
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3 if way == "iPC" else 5e-3)
    optimizer = IPC(adamw, net) if way == "iPC" else adamw
    for _ in range(EPOCHS):
        for some in torch.randperm(len(x)).split(BATCH):

            def closure():
                adamw.zero_grad()
                loss = cross_entropy(net(x[some]), y[some])
                if way == "backprop":
                    loss.backward()
                return loss

            optimizer.step(closure)
    return net


# %%
# AdaECE is the mean distance between confidence and the share that is right, over bins of equal
# mass. Lower is better. It is taken over the predictions of all seeds.

ways = {way: [train(way, seed) for seed in range(SEEDS)] for way in ("backprop", "iPC")}
metrics = {(way, noise): AdaptiveCalibrationError() for way in ways for noise in NOISES}
print(f"{'noise':7}{'':8}{'accuracy, %':>12}{'AdaECE':>8}")
for (way, noise), metric in sorted(metrics.items(), key=lambda item: item[0][1]):
    for net in ways[way]:
        metric.update(net(noisy[noise]).detach().softmax(1), labels)
    right = torch.cat(metric.probabilities).argmax(1) == torch.cat(metric.labels)
    print(f"{noise:<7}{way:8}{100 * right.float().mean():>12.1f}{metric.compute():>8.3f}")

# %%
# On the dashed line confidence is what it should be. Below it a model is too sure of itself.

figure, axes = plt.subplots(1, 2, figsize=(4.8, 3.0), sharey=True, layout="constrained")
for ax, noise in zip(axes, NOISES[1:], strict=True):
    for way in ways:
        ax.plot(*metrics[way, noise].reliability(), "o-", ms=3, label=way)
    ax.plot((0, 1), (0, 1), "k--", lw=1)
    ax.set(title=f"noise {noise}", xlabel="confidence", aspect="equal")
axes[0].set_ylabel("share that is right")
names = axes[0].get_legend_handles_labels()
figure.legend(*names, loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %%
# Which is better calibrated, and by how much, whichever way it falls. These are few seeds of one
# small network, at learning rates that were not tuned for calibration.

for noise in NOISES:
    errors = {way: float(metrics[way, noise].compute()) for way in ways}
    better, gap = min(errors, key=errors.get), max(errors.values()) - min(errors.values())
    print(f"noise {noise}: {better}, by {gap:.3f}")
