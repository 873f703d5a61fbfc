"""`python -m kvstore.node --spec FILE`."""

import sys

from kvstore.node.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
