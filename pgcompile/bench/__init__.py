"""The bench behind `pgcompile bench`: one training step, packed, dense and as others share prefixes.

A case (cases.py) is a batch whose prefix tree is known by construction. Contestants (contestants.py, peers.py) compute
its answers' log-probabilities with the same parameters (models.py). measure.py checks that they agree, then times them
in turns; results.py keeps what was measured; table.py, plot.py and page.py show it. command.py is the command;
choices.py reads what was asked for.
"""
