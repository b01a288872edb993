"""The form of a recording: which sites are nodes, what their stages are, and the pieces to run.

A form depends on the calls and their wiring alone, not on the tensors. So it is worked out once and
serves every batch whose recording looks the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_pc.recording.calls import Program
from lightning_pc.recording.sites import Expected


@dataclass
class Stage:
    """The calls between the nodes that a prediction (or the loss) reads and that prediction.

    Attributes:
        slot: Of the prediction.
        parents: The nodes through which gradients reach it, by number.
        parameters: Slots of the trainable parameters likewise.
        calls: Indices of the calls.
    """

    slot: int
    parents: list[int]
    parameters: list[int]
    calls: set[int]


@dataclass
class Piece:
    """Stages that share calls, run together.

    Attributes:
        program: Their calls.
        nodes: The nodes that they predict, by number.
        loss: Whether the loss's stage is one of them.
        values: The nodes that they read.
        parents: The nodes through which gradients reach them.
        parameters: Slots of their trainable parameters.
        given: Slots of the parameters and constants that they read.
    """

    program: Program
    nodes: list[int]
    loss: bool
    values: list[int]
    parents: list[int]
    parameters: list[int]
    given: list[int]


@dataclass
class Form:
    """What is known of a recording of this form.

    Attributes:
        expected: What a further recording of this form looks like.
        loss: Slot of the loss.
        nodes: Index of each node's site.
        stages: Of each node.
        loss_stage: Of the loss.
        pieces: All that is run.
        whole: All calls and sites of the loss, in order, for error coordinates.
        losses: Indices of the loss calls on which the loss depends.
        penalised: Slots of parameters that only penalties of weights read in the loss's stage.
        depths: Of each node; empty until a batch has told.
        arrivals: Of each node.
        reached: Slot of a parameter -> first step at which an error reaches it.
    """

    expected: Expected
    loss: int
    nodes: list[int]
    stages: list[Stage]
    loss_stage: Stage
    pieces: list[Piece]
    whole: Program
    losses: list[int]
    penalised: set[int]
    depths: list[int] = field(default_factory=list)
    arrivals: list[int] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
