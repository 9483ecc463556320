"""One family of networks a file; each takes a callable from Site to a norm layer and knows no law by name."""
