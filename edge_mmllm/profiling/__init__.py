"""What a run costs, and on what machine: memory, CPU, limits, statistics."""
