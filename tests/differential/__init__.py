"""Differential test: the same operations on this union and on kernel overlayfs, over equal layers.

``syscalls``    raw system calls and switching of the calling thread's user
``sides``       one of the two mounts with its backing file systems
``layers``      the lower layers that both sides start from
``driver``      executes one operation on one side, and says comparably what happened
``snapshot``    a tree, or an upper layer on disk, as a comparable dictionary
``operations``  what an operation is, its text form, and hypothesis strategies for sequences of them
``machine``     runs one sequence on both sides and stops at the first difference
``replay``      ``python -m tests.differential.replay FILE`` runs a printed sequence again, step by step
"""
