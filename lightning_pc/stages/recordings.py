"""Records the user's forward batch after batch, and puts everything back where that fails."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_pc.errors import PCError
from lightning_pc.nodes.model import Model
from lightning_pc.recording.draws import RandomStates
from lightning_pc.recording.modules import Learned
from lightning_pc.recording.sites import Site, leaves_of
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.batch import Batch
from lightning_pc.stages.checks import early_message
from lightning_pc.stages.prepare import Forms


class Recordings:
    """The recordings of one module.

    Args:
        model: The module.
        forms: What its recordings have looked like.
        softmax: Energy at the logits of a softmax.
        keeps: Values are kept from call to call (``reset="never"``), which draw the same each time.

    Attributes:
        kept: Sites with values to stand again; None for fresh ones.
        forms: What its recordings have looked like.
    """

    def __init__(self, model: Model, forms: Forms, softmax: str, keeps: bool) -> None:
        self.model, self.forms = model, forms
        self.kept: list[Site] | None = None
        self._softmax, self._keeps = softmax, keeps
        self._learned = Learned()
        self._draws: RandomStates | None = None
        self._behind: dict[int, tuple[weakref.ref[Tensor], list[nn.Parameter]]] = {}

    @contextmanager
    def recording(self, held: set[nn.Parameter] | None) -> Iterator[Watch]:
        """One forward is recorded and made ready inside; if that fails, all is as before.

        Args:
            held: Parameters that the optimizer moves, None for all.
        """
        saved = None if self.forms.expected else self.model.save(held or set())
        start = RandomStates(everywhere=self._keeps)
        if self._draws is not None:
            self._draws.restore()
        placement, model = self.model.look(), self.model
        expected, early = self.forms.expected, self._early(held)
        seen = (self._learned, self._softmax, model.names, model.own, expected)
        watch = Watch(placement, *seen, self.kept, early)
        try:
            yield watch
        except PCError:
            watch.undo()
            if saved is not None:
                saved.put_back()
            start.restore()
            raise
        finally:
            if self._draws is not None:
                start.restore()
        if self._keeps and self._draws is None:
            self._draws = start

    @contextmanager
    def undone(self, held: set[nn.Parameter] | None) -> Iterator[None]:
        """What is recorded inside changes neither the model nor the generators."""
        start, saved = RandomStates(), self.model.save(held or set())
        try:
            yield
        finally:
            saved.put_back()
            start.restore()

    def keep_in_mind(self, batch: Batch) -> None:
        """The values of a batch stand for the weights that predicted them."""
        self._behind = {
            id(node.x): (weakref.ref(node.x), batch.parameters(stage))
            for node, stage in zip(batch.nodes, batch.graph.stages, strict=False)
        }

    def forget(self) -> None:
        """The next batch starts anew."""
        self.kept, self._draws = None, None

    def _early(self, held: set[nn.Parameter] | None) -> Callable[[Tensor], str]:
        """Says what is wrong with a tensor that was computed before the forward."""
        # A value of the batch before stands for the weights that predicted it.
        behind = self._behind

        def early(tensor: Tensor) -> str:
            reached: set[Tensor] = set()
            for leaf in leaves_of(tensor):
                ref, weights = behind.get(id(leaf), (None, []))
                reached.update(weights if ref is not None and ref() is leaf else [leaf])
            trained = {leaf for leaf in reached if held is None or leaf in held}
            return early_message(trained, self.model.model) if trained else ""

        return early
