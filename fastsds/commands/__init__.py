"""The commands: each a config dataclass, which is its command line and its YAML file, and what it runs."""
