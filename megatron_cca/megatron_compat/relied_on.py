"""Declarations of what a file of this package needs from Megatron-Core 0.19.2 or Transformer Engine 2.11 to 2.19."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReliedOn:
    """A name that must exist, and what else must be true of it.

    Attributes:
        name: the dotted name, beginning with the package.
        why: what the name does or why it is needed, in one line.
        parameters: all parameters of a function, in order. Used if the function is replaced or overridden.
        takes: some parameters of a function or class, those that are passed to it.
        has: attributes that an object has, or that the source of a class sets on ``self``.
        says: text that the source of a module, class or function must contain, because its behaviour is needed.
        equals: the value of a constant.
    """

    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    takes: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    equals: object = None
