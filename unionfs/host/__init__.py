"""What is mounted on this host and who serves it: mount tables, state files, checks before a mount, kernel binds."""
