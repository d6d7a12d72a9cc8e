"""No test reads what a device was calibrated to (it would pack other batches than elsewhere) or writes Dynamo's log."""

import logging
import os

import torch  # noqa: F401  (it makes its loggers when it is imported)

os.environ["PGCOMPILE_CACHE_DIR"] = os.devnull  # no folder, so that nothing is in it

# pytest hangs its handlers on loggers that don't propagate, and with a handler this one writes out every graph
logging.getLogger("torch.__trace").propagate = True
