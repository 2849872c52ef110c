"""From a model and a file of preferences to a better model, in a run folder: what the command line does."""
