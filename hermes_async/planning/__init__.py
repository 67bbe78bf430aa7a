"""How is the budget divided? From a model's sizes and a machine's speeds to a plan."""
