"""Golden data: what other implementations computed, and the programs that made them compute it."""
