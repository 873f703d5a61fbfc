"""One rank at run time: how it is made, how plans reach it, and how it carries them out."""
