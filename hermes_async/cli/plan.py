"""`hermes-async plan`: how a budget would be divided, without reading a weight."""

from __future__ import annotations

import json

from hermes_async.cli import options
from hermes_async.cli.running import errors_in_one_line
from hermes_async.engine.opening import open_model


def plan(
    model: options.Model,
    memory: options.Memory = "auto",
    loading_agents: options.LoadingAgents = None,
    max_resident_layers: options.MaxResidentLayers = None,
    json_output: options.Json = False,
) -> None:
    """Show how a budget would be divided, without loading the model."""
    with errors_in_one_line():
        opened = open_model(model, memory, options.engine_config(loading_agents, max_resident_layers))
        opened.close()
        print(json.dumps(opened.plan.as_dict()) if json_output else opened.plan)
