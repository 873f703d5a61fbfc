"""The arenas of other hosts, over TCP or read by NIXL."""
