"""How much memory may this process take? What the machine leaves, and what engines of one user agree on."""
