"""What clients connect to: the wires, the origins they may come from, and the proxy for everything else."""
