"""Configuration: command line -> checked, complete and signed values, decided for a machine."""
