"""One law a file; ``base`` holds what they share, ``placement`` decides which law stands at which site."""
