"""`scripts/integration.sh`: does unionfs work on this host, with its kernel, its Python and its file systems?

A *host* is any Linux where this runs as root: a Vagrant box, a virtual machine with an old kernel (`scripts/vm-test`), a
laptop. The wheel is built, or given, and installed into a new virtual environment; what is checked is that installation, not
the checkout. A *check* is a function that is given the host and an empty room of its own, does real work in a mount, and

- returns what is worth telling, in a few words;
- raises `Wrong`: what failed, as a person needs it to go on;
- raises `LeftOut`: this host lacks what the check is about (a kernel without overlayfs, no git), which is said and counted.

The judge is the host itself: its kernel's overlayfs on equal layers, or where it has none its bare file system.

``host``      the host, its rooms, and running programs there
``run``       runs the checks and watches that none of them leaves anything mounted or running
``report``    a line for each check, JUnit XML and JSON
``install``   wheel and sdist: built, installed, tried
``work``      tar, git, a build, SQLite
``oracle``    the table of POSIX behaviours, layers exchanged with overlayfs, file systems
``volumes``   bind mounts, named volumes, backup
``people``    mounts of an ordinary user
``system``    mount(8), fstab, systemd
``speed``     a short table beside overlayfs

This package runs with the host's own Python and needs nothing but its standard library.
"""
