"""What the verbs find out, as data: all that a renderer knows."""

__all__ = ["differences", "estimates", "factor_changes", "plot_data", "validation", "verbs", "weight_figures"]
