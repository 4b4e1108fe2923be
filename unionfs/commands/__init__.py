"""The command lines: `unionfs`, mount(8)'s helper and podman's mount program. Nothing below knows of them."""
