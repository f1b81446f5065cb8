"""A small controller a node: starts workers, passes announcements on, hosts one end of the clock. Knows no RL."""
