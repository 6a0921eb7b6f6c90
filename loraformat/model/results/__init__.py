"""The results of the verbs, as data for the renderers."""

__all__ = ["differences", "estimates", "factor_changes", "plot_data", "validation", "verbs", "weight_figures"]
