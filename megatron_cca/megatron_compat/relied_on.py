"""How a file of this package declares what it needs of Megatron-Core 0.19.2 or Transformer Engine 2.11 to 2.19."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReliedOn:
    """A name, and what must be true of it beside that it exists.

    Attributes:
        name: the dotted name, from the package on.
        why: what would go wrong without it, in one line.
        parameters: all parameters of a function, in order, where it is replaced or overridden.
        takes: parameters that a function or class is called with, among others.
        has: attributes that an object has, or that the source of a class sets on ``self``.
        says: text in the source of a module, class or function, where its behaviour is relied on.
        equals: the value of a constant.
    """

    name: str
    why: str
    parameters: tuple[str, ...] | None = None
    takes: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    equals: object = None
