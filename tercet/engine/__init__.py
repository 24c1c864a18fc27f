"""What the roles share: blocks, sequences, scheduler, runner, sampler, and the loop that drives them."""
