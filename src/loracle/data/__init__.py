"""From a file or a hub to typed examples: sources, schema, splits, audit."""
