"""What ranks of a group say to each other while they compute one model together: sums and gathers of tensors, hidden
states from stage to stage, tokens to the experts that they go to and back; and what rank 0 tells the others.

    rank 0                                              rank 1, 2 ... each
      │ <──────────────join(rank, proof)───────────────── │   line: a socket for each
      │ <──────────────here(its exchange)──────────────── │
      │ ───────────setup(venue), memory's fd────────────> │
      │ <────────process groups, shared memory, links───> │   setup makes Ranks of them, among all
      │                                                   │
      │ ──────────────step(number, plan)────────────────> │   talk: both ends beat as well
      │ <───────────────sums, gathers───────────────────> │   collectives: the ranks of a tensor group
      │ ───────────────hidden states────────────────────> │   stages: to the next one
      │ <─────────rows to experts, and back─────────────> │   spread, exchange: all ranks of a stage
      │ <─────────────drawn(number, results)───────────── │   talk

Files, by what they are for:

    place, ranks                        where a rank stands, and what its model knows of the others
    line, talk, setup                   joining rank 0, and talking with it
    collectives, stages                 tensor and pipeline parallelism
    expert_map, spread                  which rank holds which expert, and a layer of experts that are spread
    exchange                            what both ways of moving rows share, and how many bytes they send
      collective_exchange               by torch.distributed
      direct_exchange                   by links of its own: meeting (how they are made), link, frames, pump (moves all)

Placement of ranks on nodes: tercet/placement/groups.py. Who starts them: tercet/cluster/group.py. Both sides of their
life: tercet/roles/group.py, tercet/roles/rank.py. Their steps: tercet/engine/group.py.
"""
