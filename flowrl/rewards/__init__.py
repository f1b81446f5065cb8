"""What a response is worth: rewards of ours, and the two forms in which users bring their own."""
