"""Ways to move bytes over a data link: the contract (contract.py), and one file per transport."""
