"""Where fragments are kept: the host's arena, its disk, other hosts, Redis."""
