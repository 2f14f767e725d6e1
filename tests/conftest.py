"""What holds for all tests."""

import os

# the models of the tests are so small that several threads mostly wait for each other; engine processes inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
