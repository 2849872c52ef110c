"""From a model and a file of preferences to a better model, in a run folder: what the command line does.

settings.py   what can be set
setup.py      settings -> model, tokenizer, tokenised pairs
folder.py     the run folder, in which nothing half-written is ever read as whole
fit.py        the run itself, to be killed and resumed at any moment
progress.py   what it writes and shows on the way
held_out.py   what a run was trained on and what it held out, by prompt
scoring.py    how a model rates held-out pairs, with intervals
rating.py     one evaluation, of a model or of two on the same pairs
search.py     runs side by side: lambda and learning rate
comparison.py runs side by side: methods
children.py   the processes of these runs
plots.py      curves, margins, the sweep
"""
