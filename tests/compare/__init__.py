"""`scripts/compare`: how fast this project is beside kernel overlayfs, its FUSE peers, and the bare file system.

A *subject* is something that can be mounted (`subjects`), a place in a union (`volumes`) or a store of podman's (`podman`). A
*workload* is complete work done there by ordinary programs (`workloads`). The *stage* is the directory where it all happens: it
holds the *parts* of the lower layers, made once and the same for all subjects, and for each sample a *site* with a fresh upper,
work and mount point (`stage`).

One *sample* is: new site, mount, prepare (untimed), run (timed), check (untimed), unmount, remove. A *round* takes one sample
of every workload on every subject, the subjects following one another directly and in another order each round, so that
what else the machine does falls on all alike (`bench`). What comes out are medians over rounds and their ratios (`report`).

What counts: the wall-clock time of the processes that do the work, or what the program itself says that it took where its
start would be a good part of it. File systems are synced before each timed run and not in it: a workload whose name says
fsync pays for it within its time, the others are compared by what their user waits for.
"""
