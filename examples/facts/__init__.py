"""The demo: fine-tune a real language model with ORPO on questions of fact. Run `python -m examples.facts`."""
