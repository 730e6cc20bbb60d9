"""Layer policies: what a layer may do."""
