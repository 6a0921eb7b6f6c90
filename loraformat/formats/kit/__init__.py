"""What the formats share: fields of configs, factors, scaling, findings and losses. No format itself."""
