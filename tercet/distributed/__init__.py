"""What ranks of a group say to each other while they compute one model together: sums and gathers of tensors, hidden
states from stage to stage, tokens to the experts that they go to and back."""
