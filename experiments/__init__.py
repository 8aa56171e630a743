"""The experiment: do salient rows help? `python -m experiments run`, then `report`."""

import sys
from pathlib import Path

# `python -m` puts the repository first: the installed longact, which has the native module, is to
# come before the source tree.
_ROOT = str(Path(__file__).parents[1])
sys.path[:] = [path for path in sys.path if path not in ("", _ROOT)] + [_ROOT]
