"""One call, read downward: what is behind the public functions.

    call.py         check, plan, log-odds of every row, a method's loss, the output
    head.py         the lm-head of a call, and how its rows are computed
    planning.py     which schedule, and why;  work.py: the sizes it looks at, and the limits of what exists at one time
    autograd.py     the torch.autograd.Functions;  graph.py: the same as one operator under torch.compile
    schedules/      when each vocabulary-sized product runs, a schedule a file
    projection.py   rows of hidden states x lm-head, a chunk at a time;  gemm.py: the library's products
    objective.py    the pair-level mathematics, O(rows), and the gradient of every row
    checks.py       what is asked of tensors

Schedules and projection know one device. What several ranks need is in `orpo_kernels.parallel`, and joins in `head.py`.
"""
