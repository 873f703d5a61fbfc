"""`python -m workers --spec FILE`."""

import sys

from workers.runtime.process import main

if __name__ == "__main__":
    sys.exit(main())
