"""From a model and a file of preferences to a better model, in a run folder: what the command line does.

settings.py   what can be set
setup.py      settings -> model, tokenizer, tokenised pairs
folder.py     the run folder, in which nothing half-written is ever read as whole
fit.py        the run itself, to be killed and resumed at any moment
progress.py   what it writes and shows on the way
scoring.py    how a model rates held-out pairs, with intervals
search.py     runs side by side: lambda and learning rate
plots.py      curves, margins, the sweep
"""
