"""What a network and its connections can be told."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Generic, Literal, Self, TypeVar, overload

if TYPE_CHECKING:
    from tests.support.network import Network

T = TypeVar("T")

BlockedUpgrades = Literal["refuse", "swallow"]


class Frost(Enum):
    """What a connection does."""

    NONE = auto()
    HOLD = auto()
    DISCARD = auto()


class Control(Generic[T]):
    """A setting that every open connection looks at when it is set."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type[Network], name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, network: None, owner: type[Network]) -> Self: ...
    @overload
    def __get__(self, network: Network, owner: type[Network]) -> T: ...
    def __get__(self, network: Network | None, owner: type[Network]) -> T | Self:
        return self if network is None else getattr(network, self._name, self._default)

    def __set__(self, network: Network, value: T) -> None:
        setattr(network, self._name, value)
        network.look_again()
