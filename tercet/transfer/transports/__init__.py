"""Ways to move bytes over a data link: what each must do (contract.py), and one file each."""
