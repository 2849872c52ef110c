"""What one GPU shows in minutes: `python -m benchmarks.gpu`, or `make gpu`. A module for each part of it."""
