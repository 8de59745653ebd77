"""Two processes annotate: `annotation_worker.py OUT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "recordings"))

from distributed import leave
from test_annotation import DRAWN, made

if __name__ == "__main__":
    made("t5", Path(sys.argv[1]), generation=DRAWN)
    leave()
