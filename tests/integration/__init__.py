"""Real programs at work inside a real mount."""
