"""How configuration is read: one file becomes one frozen dataclass, checked, or one line says why not.

Routers, workers, KV nodes and the command line read theirs here. Knows no dataclass of theirs.
"""
