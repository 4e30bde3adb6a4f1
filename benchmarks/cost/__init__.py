"""Time, memory and FLOPs on a CPU."""
