"""No test reads what a device was calibrated to: it would pack other batches than elsewhere."""

import os

os.environ["PGCOMPILE_CACHE_DIR"] = os.devnull  # no folder, so that nothing is in it
