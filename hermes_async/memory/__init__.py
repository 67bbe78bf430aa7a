"""How much memory may this process take? What the machine leaves, and how the engines of one user share it."""
