"""The demo model and its draft, and the scripts that train them on the CPython standard library."""
