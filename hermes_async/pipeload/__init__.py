"""Buffer to ready stage: PIPELOAD's agents, the memory governor, the planner and the pipeline they form."""
