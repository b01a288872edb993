"""Records the user's forward batch after batch, and puts everything back where that fails."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from lightning_pc.errors import ClosureError, PCError
from lightning_pc.nodes.model import Model
from lightning_pc.nodes.node import Node
from lightning_pc.nodes.placement import Placement
from lightning_pc.recording.draws import RandomStates
from lightning_pc.recording.sites import Site, leaves_of
from lightning_pc.recording.task import Learned, Task
from lightning_pc.recording.watch import Watch
from lightning_pc.stages.checks import checked_loss, early_message
from lightning_pc.stages.evaluator import Batch
from lightning_pc.stages.prepare import Forms

Output = TypeVar("Output")


class Recordings:
    """The recordings of one module.

    Args:
        model: The module.
        forms: What its recordings have looked like.
        softmax: Energy at the logits of a softmax.
        keeps: Values are kept from call to call (``reset="never"``), which draw the same each time.

    Attributes:
        kept: Sites with values to stand again; None for fresh ones.
    """

    def __init__(self, model: Model, forms: Forms, softmax: str, keeps: bool) -> None:
        self.model = model
        self.kept: list[Site] | None = None
        self._forms, self._softmax, self._keeps = forms, softmax, keeps
        self._learned = Learned()
        self._draws: RandomStates | None = None
        self._behind: dict[int, tuple[weakref.ref[Tensor], list[nn.Parameter]]] = {}

    def record(
        self,
        forward: Callable[[], Output],
        loss_of: Callable[[Output], Tensor | None],
        held: set[nn.Parameter] | None,
        prepare: Callable[[Batch, Placement], None],
        must: str,
    ) -> Output:
        """Runs the forward, once; if that fails, model and generators are as before.

        Args:
            forward: The user's forward, which computes the loss.
            loss_of: The scalar loss in what ``forward`` returns, None to skip the batch.
            held: Parameters that the optimizer moves, None for all.
            prepare: Gets the batch ready, unless it is skipped.
            must: Whose closure it is, where one that runs the model must give a loss.
        """
        saved = None if self._forms.expected else self.model.save(held or set())
        start = RandomStates(everywhere=self._keeps)
        if self._draws is not None:
            self._draws.restore()
        placement, model = self.model.look(), self.model
        watch = Watch(
            Task(
                placement=placement,
                softmax=self._softmax,
                names=model.names,
                own=model.own,
                early=self._early(held),
                forms=self._forms.expected,
                kept=self.kept,
                learned=self._learned,
            )
        )
        try:
            with watch.watching():
                output = forward()
                loss = loss_of(output)
            if loss is None and must and watch.calls:
                raise ClosureError(
                    f"The closure given to {must}.step ran the model and returned nothing: "
                    "end it with 'return loss'. To skip a batch, return before the forward."
                )
            if loss is not None:
                prepare(self._forms.prepare(watch, checked_loss(loss)), placement)
        except BaseException as error:
            if isinstance(error, PCError):
                watch.undo()
                if saved is not None:
                    saved.put_back()
            if isinstance(error, PCError) or self._draws is not None:
                start.restore()
            raise
        if self._draws is not None:
            start.restore()
        elif self._keeps:
            self._draws = start
        return output

    @contextmanager
    def undone(self, held: set[nn.Parameter] | None) -> Iterator[None]:
        """What is recorded inside changes neither the model nor the generators."""
        start, saved = RandomStates(), self.model.save(held or set())
        try:
            yield
        finally:
            saved.put_back()
            start.restore()

    def keep_in_mind(self, nodes: Iterable[Node]) -> None:
        """The values of a batch stand for the weights that predicted them."""
        self._behind = {id(n.x): (weakref.ref(n.x), n.parameters) for n in nodes}

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
