"""Our kernels alone: what they compile to, which tile is fastest, how near a pass is to the machine's bandwidth."""
