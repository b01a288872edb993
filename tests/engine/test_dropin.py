"""Models that nobody wrote for us: they learn, all of them moves, and nothing of us stays."""

import re

import pytest
import torch

from lightning_pc import describe
from lightning_pc.optim import IPC
from tests.compare import twin
from tests.engine.problems import PROBLEMS
from tests.engine.tiny import TINY
from tests.marks import mostly_slow

STEPS = 12


def traces(model):
    """Everything by which a module could tell that somebody was there."""
    hooks = [k for k in vars(torch.nn.modules.module) if "hook" in k]
    return (
        [
            (name, type(m), sorted(vars(m)), m.training, m.forward.__func__)
            for name, m in model.named_modules()
        ],
        [{k: dict(v) for k, v in vars(m).items() if "hook" in k and v} for m in model.modules()],
        {k: dict(vars(torch.nn.modules.module)[k] or {}) for k in hooks if k.startswith("_global")},
        {n: (p.requires_grad, type(p), dict(vars(p))) for n, p in model.named_parameters()},
        {n: (type(b), b.requires_grad) for n, b in model.named_buffers()},
        [(k, type(v)) for k, v in model.state_dict().items()],
        [torch.overrides._len_torch_function_stack()],
    )


def check(model, loss, ffn, count, lr=1e-3, value_nodes="auto"):
    """12 iPC steps against as many steps of backprop, with the same random draws."""
    other, start = twin(model), twin(model)
    before = traces(model)
    torch.manual_seed(0)
    rows = describe(model, lambda: loss(model), value_nodes=value_nodes, print_table=False).rows
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert len([name for name in names if re.fullmatch(ffn, name)]) == count, names

    optimizer = IPC(torch.optim.AdamW(model.parameters(), lr), model, value_nodes=value_nodes)
    plain = torch.optim.AdamW(other.parameters(), lr)
    losses, reached, most = [], set(), {}
    for step in range(STEPS):
        torch.manual_seed(step)
        losses.append(optimizer.step(lambda: loss(model)).item())
        for name, energy in optimizer.report.peak_energy.items():
            most[name] = max(energy, most.get(name, 0.0))
        torch.manual_seed(step)
        plain.zero_grad()
        loss(other).backward()
        if step == 0:
            # A gradient of rounding errors alone (a key's bias) is none.
            largest = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
            reached = {
                n
                for n, p in other.named_parameters()
                if p.grad is not None and p.grad.abs().max() > 1e-7 * largest
            }
            torch.manual_seed(0)
            assert losses[0] == pytest.approx(loss(start).item(), rel=1e-5)
        plain.step()
    assert optimizer.report.steps >= 8
    assert optimizer.report.nodes == names
    parameters = dict(model.named_parameters())
    for name in names:
        weight = name.removesuffix("softmax") + "weight"
        if weight in parameters and weight not in reached:
            continue  # a gate whose one expert counts in full: its logits have no slope
        # Errors of a batch known by heart fall to the rounding of the values: of all batches, then.
        assert most[name] > 0, name
    assert losses[-1] < losses[0]
    old = dict(start.named_parameters())
    assert [n for n, p in model.named_parameters() if n in reached and p.equal(old[n])] == []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.isfinite().all()
        if name in reached:
            assert not torch.equal(p, q), name
    assert traces(model) == before


#: One of each kind.
QUICK = ("bert", "gpt2", "mixtral", "mamba", "t5", "resnet")


@pytest.mark.parametrize("name", mostly_slow(TINY, *QUICK))
def test_hugging_face(name):
    tiny = TINY[name]
    model, batch = tiny.make(), tiny.draw()
    check(model, lambda m: m(**batch).loss, tiny.ffn, tiny.count if tiny.ffn else 0)


TORCH = {  # name -> key of a problem, value_nodes, regex of its FFN nodes, their number
    "encoder": ("transformer", "auto", r"encoder\.layers\.\d\.(relu|gelu)", 2),
    "encoder-gelu": ("transformer, prenorm", "auto", r"encoder\.layers\.\d\.(relu|gelu)", 2),
    "lstm": ("lstm", ["embedding", "fc"], "fc", 1),
    "lstm-output": ("lstm", ["lstm"], r"lstm\[0\]", 1),
    "lstm-and-auto": ("lstm", ["lstm", "auto"], "relu", 1),
    "unet": ("unet", "auto", r"act(#\d)?", 5),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_modules(name):
    key, value_nodes, ffn, count = TORCH[name]
    problem = PROBLEMS[key]
    x, y = problem.draw(8)
    model = problem.make()
    check(model, lambda m: problem.loss(m, x, y), ffn, count, value_nodes=value_nodes)
