"""
Watch the energy fall
=====================

While a batch is learned, each value node has an energy: how far it is from what the module
computed. Here it is watched over the inference steps t of one batch, and over training.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pc import EnergyMonitor, PCStrategy, explain
from lightning_pc.plots import plot_energy, plot_history

torch.set_num_threads(1)
L.seed_everything(0, verbose=False)

# %%
# An ordinary LightningModule. Nothing in it knows of predictive coding.


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [module for _ in range(3) for module in (nn.Linear(64, 64), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


pixels, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(digits))

# %%
# The strategy says how to learn. ``EnergyMonitor`` remembers the energies of every batch. A small
# callback keeps the report of the first batch, to compare it with that of the last.


class First(L.Callback):
    report = None

    def on_train_batch_end(self, trainer, *_):
        self.report = self.report or trainer.strategy.report


monitor, first = EnergyMonitor(), First()
off = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
quiet = {"accelerator": "cpu", "callbacks": [monitor, first], **dict.fromkeys(off, False)}
trainer = L.Trainer(strategy=PCStrategy("pc", T=16), max_epochs=6, **quiet)
trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True, drop_last=True))
reports = {"the first batch": first.report, "the last batch": trainer.strategy.report}

# %%
# Within a batch errors spread from the loss to the first layer, one stage at each t. So energies of
# nodes rise. F, which is their sum and the loss, falls. Over training less is left to infer.

figure, axes = plt.subplots(3, 1, figsize=(4.8, 8.4), layout="constrained")
plot_energy(first.report, axes[0]).set_title("nodes, the first batch")
axes[0].lines[-1].remove()  # F, which has a panel of its own
axes[0].relim()
plot_history(monitor.history, axes[2]).set_title("nodes, all batches, after inference")
for (name, report), style in zip(reports.items(), ("k-", "k--"), strict=True):
    F = report.free_energy
    axes[1].plot(F / F[0], style)
    axes[1].text(report.steps - 1, F[-1] / F[0] + 0.05, name, ha="right")
axes[1].set(title="F, as a share of F at t = 0", xlabel="inference step t", ylim=(0, 1.1))
for ax in axes[::2]:
    ax.get_legend().remove()
names = axes[2].get_legend_handles_labels()
figure.legend(*names, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
# The last batch in words, with a verdict
# (`A run that does not learn <../guides/debugging.html>`_ tells what to do about others):

print(explain(trainer.strategy))
