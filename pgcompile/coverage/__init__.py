"""The bench behind `pgcompile coverage`: every causal-LM type of transformers, packed against eager."""
