"""Many value nodes as a tree of modules, in which modules that are alike stand once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text
from rich.tree import Tree


@dataclass(frozen=True)
class NodeRow:
    """One line of `describe`; where no node stands all but name and shape is empty.

    Attributes:
        name: Dotted name of the place.
        shape: [B, *].
        energy: Name of its node energy.
        parents: Nodes from which it is predicted.
        depth: Fewest stages to the loss.
        parameters: Number of trainable weights of its stage.
        why: Why no node stands there.
    """

    name: str
    shape: tuple[int, ...]
    energy: str = ""
    parents: tuple[str, ...] = ()
    depth: int = 0
    parameters: int = 0
    why: str = ""


@dataclass
class _Branch:
    """A module: its own places, of all modules that are alike, and the modules inside."""

    rows: list[NodeRow] = field(default_factory=list)
    inner: dict[str, _Branch] = field(default_factory=dict)

    def kind(self) -> list[Any]:
        """Equal for modules that are alike."""
        own = [(row.shape, row.energy, row.why) for row in self.rows[:1]]
        return [own, [(name, branch.kind()) for name, branch in self.inner.items()]]

    def join(self, other: _Branch) -> None:
        self.rows += other.rows
        for name, branch in self.inner.items():
            branch.join(other.inner[name])

    def fold(self) -> list[tuple[list[str], _Branch]]:
        """The modules inside, with their names; neighbours that are alike are one."""
        runs: list[tuple[list[Any], list[str], _Branch]] = []
        for name, branch in self.inner.items():
            kind = branch.kind()
            if runs and runs[-1][0] == kind:
                runs[-1][1].append(name)
                runs[-1][2].join(branch)
            else:
                runs.append((kind, [name], branch))
        return [(names, branch) for _, names, branch in runs]

    def label(self, name: str) -> Text:
        if not self.rows:
            return Text(name)
        row = self.rows[0]
        size = "x".join(map(str, row.shape))
        if row.why:
            return Text(f"{name}  {size}  {row.why}", "dim")
        depth, weights = (
            _span(each) for each in zip(*((r.depth, r.parameters) for r in self.rows), strict=True)
        )
        told = f"  {size}  {row.energy}  depth {depth}  {weights} weights"
        return Text(name, "bold").append(told, "not bold")

    def hang(self, tree: Tree) -> None:
        """Adds the modules inside; one that has nothing beside it shares a line with its own."""
        for names, branch in self.fold():
            told, inner = names[0], branch
            if names[1:]:
                told = f"{names[0]} to {names[-1]} ({len(names)} alike)"
            while not names[1:] and not inner.rows and len(inner.inner) == 1:
                ((further, inner),) = inner.inner.items()
                told = f"{told}.{further}"
            inner.hang(tree.add(inner.label(told)))


def tree_of(rows: Iterable[NodeRow], title: str) -> Tree:
    """The places ``rows``, in their order, below a title."""
    root, tree = _Branch(), Tree(Text(title, "italic"))
    for row in rows:
        branch = root
        for part in row.name.split("."):
            branch = branch.inner.setdefault(part, _Branch())
        branch.rows.append(row)
    root.hang(tree)
    return tree


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, such as ``"1, 4-9"``; two in a row stay apart."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]}-{run[-1]}" if run[2:] else ", ".join(map(str, run)) for run in runs]
    return ", ".join(told)


def _span(numbers: Iterable[int]) -> str:
    least, most = min(found := [*numbers]), max(found)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
