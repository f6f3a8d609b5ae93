"""Let each process that tests start collect garbage less often: a tenth of the CPU of its imports."""

import gc

gc.set_threshold(10_000)  # instead of 700
