"""How weights are changed: rounded, scaled into one another, set to zero, factored. One file a method.

A method sees matrices and statistics of their inputs; it knows nothing of models, layers or files.
"""
