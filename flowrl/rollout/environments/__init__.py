"""The user's environments: what they look like, and how one is played against without waiting for it in the loop."""
