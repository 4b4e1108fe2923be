"""Named volumes: their records, their directories, and how they come into a mount."""
