"""Makes the small models of tests/nn known here."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'nn'))
sys.path.append(str(pathlib.Path(__file__).parents[1] / 'jobs'))
