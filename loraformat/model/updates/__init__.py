"""What an adapter does to one weight: the kinds of update, each by its class."""
