"""Where prompts come from: examples, their files and tasks, their order, and their form as tokens."""
