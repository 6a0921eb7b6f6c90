"""Which update lands on which rows and columns of which stored weight. Pure."""
