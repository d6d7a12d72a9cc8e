"""The command `pgcompile`."""
