"""What `tests.faults.torture` is made of: a seeded world of nodes, clients and faults, and who judges it."""
