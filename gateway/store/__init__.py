"""Redis or Valkey: one server, one behind Sentinel, or a cluster; asked by scripts, in order."""

from gateway.store.calls import Argument
from gateway.store.lane import Lane
from gateway.store.refusals import StoreError, StoreUnavailable
from gateway.store.scripts import Script, load_script
from gateway.store.store import Store
from gateway.store.topology import Shard

__all__ = ["Argument", "Lane", "Script", "Shard", "Store", "StoreError", "StoreUnavailable", "load_script"]
