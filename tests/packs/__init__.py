"""Writers of every pack layout, with random weights."""
