"""
A generative model of digits
============================

Predictive coding turned round: causes on top, pixels below. The network learns to generate digits.
The causes of a digit are inferred, from all of it or from its upper half.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_pc import infer
from lightning_pc.losses import squared_error
from lightning_pc.nn import Latent
from lightning_pc.optim import IPC

torch.set_num_threads(1)
torch.manual_seed(0)
CAUSES, EPOCHS, BATCH, SHOWN = 12, 8, 50, 8

# %%
# ``Latent`` stands for the causes. No other module of the package is written into a model.
# Nothing predicts its values but a normal prior, so they are inferred from the data.


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.causes = Latent(CAUSES)
        self.net = nn.Sequential(nn.Linear(CAUSES, 128), nn.Tanh(), nn.Linear(128, 64))

    def forward(self, size):
        return self.net(self.causes(size))


pixels = torch.tensor(load_digits().data / 4).float()[torch.randperm(1797)]
x, unseen = pixels[:1500], pixels[1500:]

# %%
# It learns as any model does. The loss is the squared error of the pixels.

generator = Generator()
optimizer = IPC(torch.optim.Adam(generator.parameters(), lr=1e-3), generator)
for _ in range(EPOCHS):
    for some in x[torch.randperm(len(x))].split(BATCH):
        optimizer.step(lambda: squared_error(generator(len(some)), some))

# %%
# ``infer`` leaves the weights alone and lets the values relax. What you know of the data goes into
# the loss: all pixels, or the upper half alone, and the lower half is inferred.


def causes_of(data, known=64):
    """The causes of digits, and the digits that they generate."""

    def clamped():
        made = generator(len(data))
        return squared_error(made[:, :known], data[:, :known]), made

    found = infer(generator, clamped)
    return found.values["causes"], found.output


_, again = causes_of(unseen)
_, completed = causes_of(unseen, known=32)

# %%
# New digits come from new causes, drawn with the mean and the covariance of those of the training
# digits. More of it: `A generative model <../guides/generative.html>`_.

causes, _ = causes_of(x)
draw = torch.distributions.MultivariateNormal(causes.mean(0), torch.cov(causes.T))
with torch.no_grad():
    drawn = generator.net(draw.sample((SHOWN,)))

variance = (unseen - x.mean(0)).square().sum()
for name, made in {"from all pixels": again, "from the upper half": completed}.items():
    print(f"{name}: {(made - unseen).square().sum() / variance:.1%} of variance missed")

rows = {"unseen": unseen, "generated": again, "completed": completed, "drawn": drawn}
figure, axes = plt.subplots(len(rows), SHOWN, figsize=(4.8, 2.7), layout="constrained")
for line, (name, made) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, digit in zip(line, made, strict=False):
        ax.imshow(digit.view(8, 8), cmap="gray_r", vmin=0, vmax=4)
        ax.set(xticks=[], yticks=[])
plt.show()
