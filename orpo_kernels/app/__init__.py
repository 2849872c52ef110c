"""The command line: what people run who do not write a loop. It imports the library, which never imports it.

cli/            the commands, a file each
finetuning/     what they do, in run folders
data/           preference files
costs.py        what head and loss cost, ours and the peers';  gpus.py: data sheets
doctor.py       which kernels run here, tested;  machine.py: what there is
errors.py       what a user is told
"""
