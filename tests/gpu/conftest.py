"""Tests for real GPUs. Without one there is nothing here to collect."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
