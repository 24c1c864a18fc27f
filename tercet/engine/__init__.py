"""What the roles share: blocks, sequences, scheduler, runner, sampler, the loop that drives them, and how a group of
ranks runs a step."""
