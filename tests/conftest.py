"""No test reads what a device was calibrated to (it would pack other batches than elsewhere) or writes Dynamo's log."""

import logging
import os

import pytest
import torch  # its loggers are made when it is imported

os.environ["PGCOMPILE_CACHE_DIR"] = os.devnull  # no folder, so that nothing is in it

# pytest hangs its handlers on loggers that don't propagate, and with a handler this one writes out every graph
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture
def fresh():
    """Nothing is compiled, and nothing counted."""
    import pgcompile
    from pgcompile import artifacts

    torch._dynamo.reset()
    artifacts._families.clear()  # else a model like one of an earlier test finds its packed graph compiled
    pgcompile.reset_stats()
    yield
    torch._dynamo.reset()
