"""From a model and a file of preferences to a better model, in a run folder: what the command line does.

What a command does is in the module of its name, and what it says in the one of the same name in `app/cli`:

inspect.py    data before anything is trained
train.py      the run itself, to be killed and resumed at any moment
evaluate.py   one evaluation, of a model or of two on the same pairs
sweep.py      runs side by side: lambda and learning rate
compare.py    runs side by side: methods
several.py    what these two have in common

What they are made of:

settings.py   what can be set
setup.py      settings -> tokenizer, tokenised pairs, the two sides of the data
pretrained.py a model from its folder or the hub, loaded whole or refused, and saved as it came
folder.py     the run folder, in which nothing half-written is ever read as whole
manifest.py   size and hash of files, by which a damaged one is found
inputs.py     hashes of what a run trains on, by which a resumed run is the same one
held_out.py   what a run was trained on and what it held out, by prompt
progress.py   what a run writes and shows on the way
remarks.py    what else is told to people
scoring.py    how a model rates held-out pairs, with intervals
plots.py      curves, margins, the sweep
records.py    JSON that every reader takes
processes.py  the processes of one run, on several GPUs
children.py   a run in a process of its own
"""
