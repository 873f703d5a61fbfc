"""Which numbers a stored weight can be: integers, 8-bit floats, 4-bit floats, each times its group's scale.

A grid knows how to choose scales and to round; which of two neighbours a weight becomes is a method's business.
"""
